"""Recipes: what was predicted of them, what was measured, and what they are better or worse than."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from epic_quant.records.subjects import QualityRecord
from epic_quant.report.analysis.policies import is_recipe, made_recipes
from epic_quant.report.formatting import quotient
from epic_quant.results.run import Run
from epic_quant.spec import NOISE_FLOOR, REFERENCE

# A prediction within this factor of what was measured is called good.
FACTOR = 2.0


@dataclass(frozen=True)
class Prediction:
    """A policy or recipe with its predicted divergence; `record` has the measured one.

    `rivals` are the named policies that need no more resident bytes, `better` those of them that are better by more
    than one standard error of the difference; None for what is no recipe.
    """

    record: QualityRecord
    predicted: float | None
    rivals: tuple[str, ...]
    better: tuple[str, ...] | None

    @property
    def ratio(self) -> float | None:
        """The measured over the predicted divergence."""
        return quotient(self.record.kl_divergence, self.predicted)

    @property
    def is_near(self) -> bool:
        """Whether the prediction is within the factor."""
        return self.ratio is not None and 1 / FACTOR <= self.ratio <= FACTOR


@dataclass(frozen=True)
class Group:
    """The recipes made with the same treatment of K and V: how many are no worse than any rival, and their ratios.

    `originals` has the divergence of each of the original's policies, and of the recipe at its bytes.
    """

    kv: str
    num_compared: int
    num_no_worse: int
    ratios: tuple[float, ...]
    num_near: int
    originals: tuple[tuple[str, float, float], ...]


def predictions(run: Run) -> tuple[list[Prediction], list[Prediction]]:
    """The recipes that the benchmarks made; then given ones, and policies whose classes were all measured alone."""
    made, others = [], []
    for record in run.of(QualityRecord):
        if record.policy in (REFERENCE, NOISE_FLOOR):
            continue
        one = _prediction(run, record)
        if record.recipe_at is not None:
            made.append(one)
        elif one.predicted is not None or is_recipe(run, record.policy):
            others.append(one)
    return made, others


def groups(run: Run, made: Sequence[Prediction]) -> list[Group]:
    """The recipes made, by what was done with K and V."""
    divergences = {record.policy: record.kl_divergence for record in run.of(QualityRecord)}
    originals = {record.policy for record in run.of(QualityRecord) if _is_original(record)}
    found = []
    for kv in dict.fromkeys(str(one.record.kv) for one in made):
        inside = [one for one in made if str(one.record.kv) == kv]
        compared = [one for one in inside if one.rivals and one.better is not None]
        ratios = tuple(one.ratio for one in inside if one.ratio is not None)
        falls = [
            (at, theirs, ours)
            for one in inside
            if (at := one.record.recipe_at or "") in originals
            and (theirs := divergences.get(at)) is not None
            and (ours := one.record.kl_divergence) is not None
        ]
        found.append(
            Group(
                kv,
                len(compared),
                sum(not one.better for one in compared),
                ratios,
                sum(one.is_near for one in inside),
                tuple(falls),
            )
        )
    return found


def _is_original(record: QualityRecord) -> bool:
    """Whether a policy stores weights in the original's formats."""
    return any(spec.info.module == "absmax" for spec in record.spec.weight_specs)


def _prediction(run: Run, record: QualityRecord) -> Prediction:
    predicted = record.predicted_kl_divergence
    if not is_recipe(run, record.policy):
        return Prediction(record, predicted, (), None)
    rivals = _rivals(run, record)
    return Prediction(record, predicted, tuple(one.policy for one in rivals), _better(record, rivals))


def _rivals(run: Run, record: QualityRecord) -> list[QualityRecord]:
    """A recipe may need a little less than the bytes that it is made for, and is still compared with that policy."""
    made, most = made_recipes(run), record.resident_nbytes
    found = []
    for other in run.of(QualityRecord):
        is_at = other.policy == record.recipe_at
        fits = most is not None and other.resident_nbytes is not None and other.resident_nbytes <= most
        named = other.policy != NOISE_FLOOR and other.policy not in made and not is_recipe(run, other.policy)
        if is_at or (fits and named):
            found.append(other)
    return sorted(found, key=lambda other: other.policy != record.recipe_at)


def _better(record: QualityRecord, rivals: Sequence[QualityRecord]) -> tuple[str, ...] | None:
    if record.kl_divergence is None:
        return None
    return tuple(
        other.policy
        for other in rivals
        # Of two means that are taken as independent.
        if other.kl_divergence is not None
        and record.kl_divergence - other.kl_divergence > math.hypot(record.kl_se or 0.0, other.kl_se or 0.0)
    )
