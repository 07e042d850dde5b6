"""Recipes: their predicted and measured divergence, and the policies that they beat.

The benchmarks make them at the bytes of every policy; a user gives them to `--policy` as a string.
"""

from __future__ import annotations

from collections.abc import Mapping

from epic_quant.records.subjects import QualityRecord
from epic_quant.report.analysis.policies import is_recipe, names
from epic_quant.report.analysis.recipes import FACTOR, Group, Prediction, groups, predictions
from epic_quant.report.blocks import Block, Paragraph, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import MISSING, megabytes, significant
from epic_quant.report.wording import RECIPE_COMMAND, context_tokens
from epic_quant.results.run import Run


def blocks(run: Run) -> list[Block]:
    """The recipes at the bytes of each policy, then every other policy whose classes were all measured alone."""
    called = names(run)
    made, others = predictions(run)
    measures: tuple[Column[Prediction], ...] = (
        Column("resident, MB", lambda one: one.record.resident_nbytes, megabytes),
        Column("predicted", lambda one: one.predicted, significant),
        Column("measured", lambda one: one.record.kl_divergence, significant),
        Column("measured / predicted", lambda one: one.ratio, significant),
        Column("against as many bytes", lambda one: _verdict(one, called)),
    )
    found: list[Block] = [
        Paragraph(
            "Predicted is the sum of the KL divergences that each class alone has on the calibration text, measured is "
            "that of the whole policy on the evaluation text, in nats a token. The sum holds where all are small and "
            "the errors of classes are unrelated. The last of these columns compares a recipe with every named policy "
            "of as many resident bytes or fewer: ✓ where it is no worse than any, within one standard error of the "
            "difference."
        )
    ]
    if made:
        at = {one.policy: one.kl_divergence for one in run.of(QualityRecord)}
        beside: tuple[Column[Prediction], ...] = (
            Column("at the bytes of", lambda one: called[one.record.recipe_at or ""], code, text=True),
            Column("K and V", lambda one: one.record.kv, text=True),
            Column("recipe", lambda one: called[one.record.policy], code, text=True),
            Column("that policy's", lambda one: at.get(one.record.recipe_at or ""), significant),
        )
        string: Column[Prediction] = Column("stands for", lambda one: str(one.record.spec), code, text=True)
        found += [
            Paragraph(
                "Each policy beside the recipes of least predicted divergence at its resident bytes, which also "
                "quantize the embedding and the PLE classes. Resident bytes include a KV cache of "
                f"{context_tokens(run)} tokens. With K and V in bf16, policy and recipe spend as much on them, and the "
                "recipe chooses the weights only. With K and V chosen, it can take bytes from them for the weights, "
                "which a policy with K and V in bf16 cannot."
            ),
            table([*beside, *measures, string], made),
        ]
    if others:
        policy: Column[Prediction] = Column("policy", lambda one: _full_name(run, one, called), text=True)
        found.append(table([policy, *measures], others))
    elif not made:
        found.append(Paragraph("No policy of this run consists of classes that were measured alone."))
    found.append(Paragraph(f"To make a recipe within any other budget: {code(RECIPE_COMMAND)}"))
    return found


def findings(run: Run) -> list[str]:
    """How far predictions of recipes are off, and whether recipes are no worse than named policies of their bytes."""
    called = names(run)
    made, others = predictions(run)
    found = [text for group in groups(run, made) if (text := _group(group, called))]
    for one in others:
        if not is_recipe(run, one.record.policy):
            continue
        clauses = []
        if one.ratio is not None and one.ratio > 0:
            clauses.append(
                f"measured {significant(one.record.kl_divergence)} nats a token, predicted "
                f"{significant(one.predicted)}, {'within' if one.is_near else 'not within'} a factor of "
                f"{significant(FACTOR, 1)}"
            )
        if one.rivals and one.better is not None:
            no_worse = f"no worse than any of the {len(one.rivals)} named policies of as many bytes or fewer"
            clauses.append(f"worse than {_list(one.better, called)}" if one.better else no_worse)
        if clauses:
            found.append(f"{_full_name(run, one, called)}: {'; '.join(clauses)}.")
    return found


def _group(group: Group, called: Mapping[str, str]) -> str:
    clauses = []
    if group.num_compared:
        clauses.append(
            f"{group.num_no_worse} of {group.num_compared} are no worse than any named policy of as many bytes or "
            "fewer, within one standard error"
        )
    if group.ratios:
        clauses.append(
            f"measured / predicted is {significant(min(group.ratios))} to {significant(max(group.ratios))}, for "
            f"{group.num_near} of {len(group.ratios)} within a factor of {significant(FACTOR, 1)}"
        )
    if group.originals:
        falls = (
            f"from {significant(theirs)} to {significant(ours)} at the bytes of {code(called[at])}"
            for at, theirs, ours in group.originals
        )
        clauses.append(f"KL divergence falls {', '.join(falls)}")
    return f"Recipes at the bytes of named policies, K and V {group.kv}: {'; '.join(clauses)}." if clauses else ""


def _full_name(run: Run, one: Prediction, called: Mapping[str, str]) -> str:
    """A policy by its name, a recipe by its string too."""
    name = code(called[one.record.policy])
    return f"{name}, {code(str(one.record.spec))}" if is_recipe(run, one.record.policy) else name


def _list(policies: tuple[str, ...], called: Mapping[str, str]) -> str:
    return ", ".join(code(called[policy]) for policy in policies)


def _verdict(one: Prediction, called: Mapping[str, str]) -> str:
    if one.better is None or not one.rivals:
        return MISSING
    return f"✗ {_list(one.better, called)}" if one.better else "✓"
