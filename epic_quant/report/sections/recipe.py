"""Recipes: what was predicted of them, what was measured, and what they beat.

The benchmarks make them at the bytes of every policy; a user gives them to `--policy` as a string.
"""

from __future__ import annotations

import math

from epic_quant.report.blocks import Block, Paragraph, Table, code
from epic_quant.report.formatting import MISSING, megabytes, quotient, significant
from epic_quant.results.run import Run
from epic_quant.results.sensitivities import predicted_divergence

NOISE_FLOOR = "bf16-compute"

# A prediction within this factor of what was measured is taken for good.
_FACTOR = 2.0

_COMMAND = "python -m epic_quant.recipe out.json --budget 3.5GB"


def blocks(run: Run) -> list[Block]:
    """The recipes at the bytes of each policy, then every other policy whose classes were all measured alone."""
    found: list[Block] = [
        Paragraph(
            "Predicted is the sum of the KL divergences that each class alone has on the calibration text, measured is "
            "the whole policy's on the evaluation text, in nats a token. The sum holds where all are small and the "
            "errors of classes are unrelated. The column of as many bytes holds a recipe against every named policy of "
            "as many resident bytes or fewer: ✓ where it is no worse than any, within one standard error of the "
            "difference."
        )
    ]
    if made := made_recipes(run):
        found += [
            Paragraph(
                "Each policy beside the recipes of least predicted divergence at its resident bytes, which quantize "
                "the embedding and the PLE classes too. Resident bytes count the KV cache "
                f"of {int(run.facts.get('context') or 0):,} tokens. Where K and V are kept in bf16 both spend as much "
                "on them, and the recipe has only the weights to choose for; where they are chosen too, it may "
                "take from them what it gives to the weights, which a policy with K and V in bf16 cannot."
            ),
            Table(
                (
                    "at the bytes of",
                    "K and V",
                    "that policy's",
                    "resident, MB",
                    "predicted",
                    "measured",
                    "measured / predicted",
                    "against as many bytes",
                    "recipe",
                ),
                tuple(
                    (
                        code(at),
                        kv,
                        significant(run.value("quality", "kl_divergence", policy=at)),
                        *_row(run, name),
                        code(run.policy_string(name)),
                    )
                    for name, (at, kv) in made.items()
                ),
                num_text_columns=2,
                has_remark=True,
            ),
        ]
    rows = [
        (_named(run, policy), *_row(run, policy))
        for policy in run.labels("quality", "policy")
        if policy not in ("bf16", NOISE_FLOOR, *made) and (policy in _given(run) or _predicted(run, policy) is not None)
    ]
    columns = ("policy", "resident, MB", "predicted", "measured", "measured / predicted", "against as many bytes")
    if rows:
        found.append(Table(columns, tuple(rows)))
    elif not made:
        found.append(Paragraph("No policy of this run consists of classes measured alone."))
    found.append(Paragraph(f"To make a recipe within any other budget: {code(_COMMAND)}"))
    return found


def findings(run: Run) -> list[str]:
    """How far predictions of recipes are off, and whether recipes are no worse than named policies of their bytes."""
    found = []
    made = made_recipes(run)
    for kv in dict.fromkeys(kv for _, kv in made.values()):
        found += _findings_of(run, {name: at for name, (at, its_kv) in made.items() if its_kv == kv}, kv)
    for policy in _given(run):
        predicted, measured = _predicted(run, policy), run.value("quality", "kl_divergence", policy=policy)
        ratio = quotient(measured, predicted)
        said = []
        if ratio is not None and ratio > 0:
            said.append(
                f"measured {significant(measured)} nats a token, predicted {significant(predicted)}, "
                f"{'within' if _is_near(ratio) else 'not within'} a factor of {significant(_FACTOR, 1)}"
            )
        better, rivals = _beaten_by(run, policy), _rivals(run, policy)
        if rivals and better is not None:
            no_worse = f"no worse than any of the {len(rivals)} named policies of as many bytes or fewer"
            said.append(f"worse than {', '.join(map(code, better))}" if better else no_worse)
        if said:
            found.append(f"{_named(run, policy)}: {'; '.join(said)}.")
    return found


def _findings_of(run: Run, at: dict[str, str], kv: str) -> list[str]:
    """Of the recipes with the same K and V, by name the policy at whose bytes each is."""
    verdicts = {name: better for name in at if (better := _beaten_by(run, name)) is not None and _rivals(run, name)}
    ratios = [
        ratio
        for name in at
        if (ratio := quotient(run.value("quality", "kl_divergence", policy=name), _predicted(run, name))) is not None
    ]
    said = []
    if verdicts:
        good = sum(not better for better in verdicts.values())
        said.append(
            f"{good} of {len(verdicts)} are no worse than any named policy of as many bytes or fewer, within one "
            "standard error"
        )
    if ratios:
        near = sum(map(_is_near, ratios))
        said.append(
            f"measured / predicted is {significant(min(ratios))} to {significant(max(ratios))}, for {near} of "
            f"{len(ratios)} within a factor of {significant(_FACTOR, 1)}"
        )
    original = [
        f"from {significant(theirs)} to {significant(ours)} at those of {code(policy)}"
        for name, policy in at.items()
        if policy.startswith("original")
        and (theirs := run.value("quality", "kl_divergence", policy=policy)) is not None
        and (ours := run.value("quality", "kl_divergence", policy=name)) is not None
    ]
    if original:
        said.append(f"KL divergence comes down {', '.join(original)}")
    return [f"Recipes at the bytes of named policies, K and V {kv}: {'; '.join(said)}."] if said else []


def made_recipes(run: Run) -> dict[str, tuple[str, str]]:
    """Recipes that the benchmarks made, by name: the policy at whose bytes, and what they do about K and V."""
    return {
        record.labels["policy"]: (str(record.details["recipe_at"]), str(record.details.get("kv")))
        for record in run.select("quality")
        if "recipe_at" in record.details
    }


def short_name(run: Run, policy: str) -> str:
    """A name for plots: a policy string is too long there, so those given are counted in the order of the run."""
    if policy in (made := made_recipes(run)):
        return f"recipes, K and V {made[policy][1]}"
    given = _given(run)
    return f"recipe {given.index(policy) + 1}" if policy in given else policy


def brief(run: Run, policy: str) -> str:
    """A policy in a sentence: one that goes by its string by its number."""
    return short_name(run, policy) if policy in _given(run) else policy


def is_recipe(run: Run, policy: str) -> bool:
    """Whether a policy is one that was made at the bytes of another, or goes by its string."""
    return policy in _given(run) or policy in made_recipes(run)


def _named(run: Run, policy: str) -> str:
    """A policy by its name; one that goes by its string by its number too."""
    name = brief(run, policy)
    return code(policy) if name == policy else f"{name}, {code(policy)}"


def _given(run: Run) -> list[str]:
    """Policies that go by their string, as a user gives a recipe."""
    made = made_recipes(run)
    return [policy for policy in run.labels("quality", "policy") if "=" in policy and policy not in made]


def _is_near(ratio: float) -> bool:
    return 1 / _FACTOR <= ratio <= _FACTOR


def _row(run: Run, policy: str) -> tuple[str, ...]:
    """From resident bytes to the verdict."""
    predicted, measured = _predicted(run, policy), run.value("quality", "kl_divergence", policy=policy)
    return (
        megabytes(run.value("quality", "resident_nbytes", policy=policy)),
        significant(predicted),
        significant(measured),
        significant(quotient(measured, predicted)),
        _verdict(run, policy) if is_recipe(run, policy) else MISSING,
    )


def _predicted(run: Run, policy: str) -> float | None:
    text = run.policy_string(policy)
    return predicted_divergence(run, text) if "=" in text else None


def _rivals(run: Run, policy: str) -> list[str]:
    """Policies of a name that need no more resident bytes."""
    most, made = run.value("quality", "resident_nbytes", policy=policy), made_recipes(run)
    # A recipe may come out a little below the bytes that it is made for, and is still held against that policy.
    found = [made[policy][0]] if policy in made else []
    for name in run.labels("quality", "policy"):
        nbytes = run.value("quality", "resident_nbytes", policy=name)
        if most is None or nbytes is None or nbytes > most:
            continue
        if name not in (NOISE_FLOOR, *found, *made, *_given(run)):
            found.append(name)
    return found


def _beaten_by(run: Run, policy: str) -> list[str] | None:
    """The rivals whose divergence is smaller by more than a standard error of the difference; None where unknown."""
    ours, our_error = (run.value("quality", metric, policy=policy) for metric in ("kl_divergence", "kl_se"))
    if ours is None:
        return None
    found = []
    for name in _rivals(run, policy):
        theirs, their_error = (run.value("quality", metric, policy=name) for metric in ("kl_divergence", "kl_se"))
        # Of two means that are taken as independent.
        if theirs is not None and ours - theirs > math.hypot(our_error or 0.0, their_error or 0.0):
            found.append(name)
    return found


def _verdict(run: Run, policy: str) -> str:
    better = _beaten_by(run, policy)
    if better is None or not _rivals(run, policy):
        return MISSING
    return f"✗ {', '.join(map(code, better))}" if better else "✓"
