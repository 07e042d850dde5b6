"""Policies given as a string, as recipes are: what was predicted of them, what was measured, and what they beat."""

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
    """Every policy whose classes were all measured alone, and what is made of those given as a string."""
    rows = []
    for policy in run.labels("quality", "policy"):
        predicted = _predicted(run, policy)
        measured = run.value("quality", "kl_divergence", policy=policy)
        if policy in ("bf16", NOISE_FLOOR) or (predicted is None and not _is_recipe(policy)):
            continue
        rows.append(
            (
                named(run, policy),
                megabytes(run.value("quality", "resident_nbytes", policy=policy)),
                significant(predicted),
                significant(measured),
                significant(quotient(measured, predicted)),
                _verdict(run, policy) if _is_recipe(policy) else MISSING,
            )
        )
    columns = ("policy", "resident, MB", "predicted", "measured", "measured / predicted", "against as many bytes")
    found: list[Block] = [
        Paragraph(
            "Predicted is the sum of the KL divergences that each class alone has on the calibration text, measured is "
            "the whole policy's on the evaluation text, in nats a token. The sum holds where all are small and the "
            "errors of classes are unrelated. The last column holds a recipe against every named policy of as many "
            "resident bytes or fewer: ✓ where it is no worse than any, within one standard error of the difference."
        ),
        Table(columns, tuple(rows)) if rows else Paragraph("No policy of this run consists of classes measured alone."),
    ]
    if not any(map(_is_recipe, run.labels("quality", "policy"))):
        found.append(Paragraph(f"No recipe was measured in this run. To make one: {code(_COMMAND)}"))
    return found


def findings(run: Run) -> list[str]:
    """How far predictions of recipes are off, and whether recipes are no worse than named policies of their bytes."""
    found = []
    for policy in filter(_is_recipe, run.labels("quality", "policy")):
        predicted, measured = _predicted(run, policy), run.value("quality", "kl_divergence", policy=policy)
        ratio = quotient(measured, predicted)
        said = []
        if ratio is not None and ratio > 0:
            within = "within" if 1 / _FACTOR <= ratio <= _FACTOR else "not within"
            said.append(
                f"measured {significant(measured)} nats a token, predicted {significant(predicted)}, {within} a factor "
                f"of {significant(_FACTOR, 1)}"
            )
        better, rivals = _beaten_by(run, policy), _rivals(run, policy)
        if rivals and better is not None:
            no_worse = f"no worse than any of the {len(rivals)} named policies of as many bytes or fewer"
            said.append(f"worse than {', '.join(map(code, better))}" if better else no_worse)
        if said:
            found.append(f"{named(run, policy)}: {'; '.join(said)}.")
    return found


def short_name(run: Run, policy: str) -> str:
    """A name for plots: a policy string is too long there, so recipes are counted in the order of the run."""
    recipes = [name for name in run.labels("quality", "policy") if _is_recipe(name)]
    return f"recipe {recipes.index(policy) + 1}" if policy in recipes else policy


def named(run: Run, policy: str) -> str:
    """A policy in running text: by its name, a recipe by its number and its string."""
    name = short_name(run, policy)
    return code(policy) if name == policy else f"{name}, {code(policy)}"


def _is_recipe(policy: str) -> bool:
    """Whether a policy goes by its string."""
    return "=" in policy


def _predicted(run: Run, policy: str) -> float | None:
    text = (run.facts.get("policy_strings") or {}).get(policy, policy)
    return predicted_divergence(run, str(text)) if "=" in str(text) else None


def _rivals(run: Run, policy: str) -> list[str]:
    """Policies of a name that need no more resident bytes."""
    most = run.value("quality", "resident_nbytes", policy=policy)
    found = []
    for name in run.labels("quality", "policy"):
        nbytes = run.value("quality", "resident_nbytes", policy=name)
        if not _is_recipe(name) and name != NOISE_FLOOR and most is not None and nbytes is not None and nbytes <= most:
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
