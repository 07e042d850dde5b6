"""What the PLE row cache needs for a hit rate, how fast it is, and which policies store PLE tensors in few bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from epic_quant.records.subjects import (
    EMPTY_START,
    LOWEST_IDS,
    OPTIMUM,
    PLEColdRecord,
    PLEGuardRecord,
    PLEHitsRecord,
    PLEHotRecord,
    PLEStartRecord,
    PLETextRecord,
)
from epic_quant.report.analysis.policies import made_recipes
from epic_quant.report.formatting import quotient
from epic_quant.results.run import Run
from epic_quant.spec import PolicySpec, Target, TensorClass, WeightSpec

TARGETS = (0.90, 0.95, 0.99)
GUARDED_BITS = 8.0
_GUARDED = (TensorClass.PLE_TABLE, TensorClass.PLE_PROJECTIONS)


@dataclass(frozen=True)
class Reached:
    """The residency that reaches a hit rate with the fewest rows; `of_optimum` is how many times the optimum's rows.

    Where `is_least_tried`, fewer rows may do.
    """

    target: float
    record: PLEHitsRecord
    rows: float
    is_least_tried: bool
    of_optimum: float | None

    @property
    def nbytes(self) -> float:
        """Bytes of these rows."""
        return self.rows * self.record.row_nbytes


@dataclass(frozen=True)
class Text:
    """Which ids a text uses: the share of the lowest ones, and by hit rate the rows of the best static choice."""

    name: str
    is_measured: bool
    tokens: float | None
    lowest_ids: float | None
    rows: Mapping[str, float]
    row_nbytes: int


@dataclass(frozen=True)
class Marked:
    """Tensors that a policy stores below eight bits, and the divergence of that alone, where it was measured."""

    policy: str
    tensor_class: TensorClass
    spec: WeightSpec
    is_partial: bool
    kl_divergence: float | None


def curve(record: PLEHitsRecord | PLEStartRecord) -> list[tuple[int, float]]:
    """Rows and hit rate, ascending in rows."""
    return sorted(zip(record.capacities, record.hit_rates, strict=True))


def reach(record: PLEHitsRecord, target: float) -> Reached | None:
    """Rows that reach a hit rate, between two measured numbers on the straight line over the logarithm of rows."""
    points = curve(record)
    if points and points[0][1] >= target:
        return Reached(target, record, points[0][0], True, None)
    for (low, low_rate), (high, high_rate) in pairwise(points):
        if low_rate < target <= high_rate:
            share = (target - low_rate) / (high_rate - low_rate)
            return Reached(target, record, float(low * (high / low) ** share), False, None)
    return None


def best(records: Sequence[PLEHitsRecord]) -> list[Reached]:
    """For each target the residency that needs the fewest rows, of those that do not know the future."""
    found = []
    for target in TARGETS:
        reached = {one.residency: way for one in records if (way := reach(one, target)) is not None}
        optimum = reached.pop(OPTIMUM, None)
        if reached:
            least = min(reached.values(), key=lambda way: way.rows)
            ratio = quotient(least.rows, optimum.rows) if optimum else None
            found.append(Reached(target, least.record, least.rows, least.is_least_tried, ratio))
    return found


def lowest_ids_rate(records: Sequence[PLEHitsRecord]) -> float | None:
    """The hit rate of as many of the lowest ids as the original keeps."""
    return next((one.hit_rate for one in records if one.residency == LOWEST_IDS), None)


def texts(records: Sequence[PLETextRecord]) -> list[Text]:
    """The texts that were measured, then those that were measured elsewhere, each once."""
    found = [Text(one.text, True, one.tokens, one.hit_rate, one.rows, one.row_nbytes) for one in records]
    for one in records:
        for name, figures in one.published.items():
            rows = {target: figures[target] for target in one.rows if target in figures}
            found.append(Text(name, False, figures.get("tokens"), figures.get("lowest_ids"), rows, one.row_nbytes))
    return [text for place, text in enumerate(found) if text not in found[:place]]


def misses(record: PLEStartRecord, rows: int) -> float | None:
    """Misses in the first tokens at a capacity."""
    return dict(zip(record.capacities, record.misses, strict=True)).get(rows)


def starts(records: Sequence[PLEStartRecord]) -> dict[str, float]:
    """Misses of an LRU in the first tokens at the original's rows, by what it holds at the start, where that is known.

    Nothing to compare is an empty result: no start from a list, or none from nothing.
    """
    found = {one.start: count for one in records if (count := misses(one, one.original_rows)) is not None}
    return found if EMPTY_START in found and len(found) > 1 else {}


def layer_lookups(records: Sequence[PLEHotRecord]) -> float | None:
    """Layer lookups a second, the most of all batches."""
    rates = [quotient(one.layers * one.tokens, one.time_s) for one in records]
    return max((rate for rate in rates if rate is not None), default=None)


def cold_s(record: PLEColdRecord | None) -> float | None:
    """Seconds a token of a pass that is known to have been cold."""
    return quotient(record.pass_s, record.tokens) if record else None


def marked(run: Run) -> list[Marked]:
    """Policies that store the PLE table or projections, or some of them, below eight bits; without recipes made."""
    return _marked(run, run.policies)


def num_recipes_marked(run: Run) -> int:
    """How many of the recipes made do so: each in many specs, which are not measured alone."""
    return len({one.policy for one in _marked(run, {name: one.spec for name, one in made_recipes(run).items()})})


def _marked(run: Run, policies: Mapping[str, PolicySpec]) -> list[Marked]:
    bits = {(one.tensor_class, one.spec): one.bits_per_weight for one in run.of(PLEGuardRecord)}
    effects = {(one.tensor_class, one.spec): one.kl_divergence for one in run.of(PLEGuardRecord)}
    found = []
    for name, policy in policies.items():
        for tensor_class in _GUARDED:
            for spec, is_partial in _specs(policy, tensor_class).items():
                key = tensor_class, spec.without_hessian
                known = bits.get(key)
                # A spec that was not measured alone counts by the bits of its codes.
                if (math.log2(spec.info.num_levels) if known is None else known) < GUARDED_BITS:
                    found.append(Marked(name, tensor_class, spec, is_partial, None if is_partial else effects.get(key)))
    return found


def _specs(policy: PolicySpec, tensor_class: TensorClass) -> dict[WeightSpec, bool]:
    """The specs of a class's tensors, each with whether it is for some of them only."""
    given = {target: spec for target, spec in policy.weights if target.tensor_class is tensor_class}
    narrow = {spec: True for target, spec in given.items() if target != Target(tensor_class)}
    return narrow | {policy.class_spec(tensor_class): bool(narrow)}
