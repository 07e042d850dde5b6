"""Display names of policies, and which policies are worth their bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from epic_quant.errors import SpecError
from epic_quant.records.subjects import RESIDENT, THIS_CHECKPOINT, BlockRecord, FootprintRecord, QualityRecord
from epic_quant.report.analysis.pareto import front
from epic_quant.report.formatting import quotient
from epic_quant.results.run import Run, distinct
from epic_quant.spec import NAMED, NOISE_FLOOR, REFERENCE, PolicySpec, recipe_name

_MOST_DECIMALS = 6


@dataclass(frozen=True)
class Rated:
    """A policy with its resident bytes and its error."""

    policy: str
    nbytes: float
    error: float
    standard_error: float | None = None


@dataclass(frozen=True)
class Choice:
    """A policy that is worth its bytes, for a budget below `upper` bytes.

    `gain` is how many times larger the error of the next smaller one is, for `more_nbytes` bytes less.
    `beaten` are other policies of those bytes with how many times their error is larger, the well-known ones first.
    """

    rated: Rated
    upper: float
    gain: float | None
    more_nbytes: float | None
    beaten: tuple[tuple[str, float | None], ...]
    is_within_noise: bool


class Names(dict[str, str]):
    """What policies are called, by their names in the records: where nothing else is known, that name."""

    def __missing__(self, policy: str) -> str:
        return policy


def names(run: Run) -> Names:
    """What the policies of the run are called.

    Recipes, which the benchmarks made or a user gave as a string, are called by their resident bytes:
    "recipe, 25.4 MB". Two that differ have names that differ.
    """
    every = distinct([*run.policies, *(record.policy for record in run.of(QualityRecord))])
    specs = {policy: policy_spec(run, policy) for policy in every}
    found = {policy: policy for policy in every}
    unnamed = [policy for policy in every if is_recipe(run, policy)]
    for decimals in range(1, _MOST_DECIMALS):
        found |= {policy: _recipe_name(run, policy, decimals) for policy in unnamed}
        storing = Counter(name for name, _ in {(found[policy], specs[policy]) for policy in unnamed})
        unnamed = [policy for policy in unnamed if storing[found[policy]] > 1]
    return Names(found | {policy: f"{found[policy]} ({index})" for index, policy in enumerate(unnamed, 1)})


def is_recipe(run: Run, policy: str) -> bool:
    """Whether a policy was made at the bytes of another, or was given as a string."""
    return policy in made_recipes(run) or _is_string(policy)


def made_recipes(run: Run) -> dict[str, QualityRecord]:
    """The recipes that the benchmarks made."""
    return {record.policy: record for record in run.of(QualityRecord) if record.recipe_at is not None}


def policy_spec(run: Run, policy: str) -> PolicySpec | None:
    """What a policy of the run stores; None where the run lacks it."""
    return run.policies.get(policy) or run.value(QualityRecord, "spec", policy=policy)


def resident_nbytes(run: Run, model: str = THIS_CHECKPOINT) -> dict[str, float]:
    """Resident bytes of a model by policy, where they are known."""
    records = run.of(FootprintRecord, model=model, column=RESIDENT)
    return {record.policy: record.nbytes for record in records if record.nbytes is not None}


def by_divergence(run: Run) -> list[Rated]:
    """Policies and recipes with their divergence, where that and the resident bytes are known."""
    return [
        Rated(record.policy, record.resident_nbytes, record.kl_divergence, record.kl_se)
        for record in run.of(QualityRecord)
        if record.policy != NOISE_FLOOR and record.resident_nbytes is not None and record.kl_divergence is not None
    ]


def by_block_error(run: Run) -> list[Rated]:
    """Policies with the largest error of a block relative to what it adds, where that and the bytes are known."""
    errors: dict[str, float] = {}
    for record in run.of(BlockRecord):
        if record.added_rel_l2 is not None:
            errors[record.policy] = max(record.added_rel_l2, errors.get(record.policy, 0.0))
    sizes = resident_nbytes(run)
    return [Rated(policy, sizes[policy], error) for policy, error in errors.items() if policy in sizes]


def pareto_front(rated: Sequence[Rated]) -> list[Rated]:
    """The Pareto front, by rising bytes."""
    by_name = {one.policy: one for one in rated}
    return [by_name[name] for name, _, _ in front((one.policy, one.nbytes, one.error) for one in rated)]


def choices(run: Run, rated: Sequence[Rated], noise_floor: float | None) -> list[Choice]:
    """The Pareto front, less those that one standard error hides from a smaller one, and why to choose each."""
    worth: list[Rated] = []
    for one in pareto_front(rated):
        noise = math.hypot(*(other.standard_error or 0.0 for other in (*worth[-1:], one)))
        if not worth or worth[-1].error - one.error > noise:
            worth.append(one)
    found = []
    for index, one in enumerate(worth):
        upper = worth[index + 1].nbytes if index + 1 < len(worth) else math.inf
        before = worth[index - 1] if index else None
        beaten = [
            other
            for other in rated
            if one.nbytes <= other.nbytes < upper
            and other is not one
            and not _same(policy_spec(run, other.policy), policy_spec(run, one.policy))
        ]
        beaten.sort(key=lambda other: (is_recipe(run, other.policy), other.error))
        found.append(
            Choice(
                one,
                upper,
                quotient(before.error, one.error) if before else None,
                one.nbytes - before.nbytes if before else None,
                tuple((other.policy, quotient(other.error, one.error)) for other in beaten),
                noise_floor is not None and 0 < one.error <= noise_floor,
            )
        )
    return found


def noise_floor(run: Run) -> float | None:
    """The divergence of the same weights computed in bf16; None where it was not measured."""
    floor: float | None = run.value(QualityRecord, "kl_divergence", policy=NOISE_FLOOR)
    return floor


def quantized(run: Run) -> list[QualityRecord]:
    """The policies whose quality was measured, without the reference, the noise floor and the recipes made here."""
    others = (REFERENCE, NOISE_FLOOR, *made_recipes(run))
    return [record for record in run.of(QualityRecord) if record.policy not in others]


def smallest_within(rated: Sequence[Rated], error: float) -> Rated | None:
    """The smallest policy whose error is at most this."""
    return min((one for one in rated if one.error <= error), key=lambda one: (one.nbytes, one.policy), default=None)


def _same(one: PolicySpec | None, other: PolicySpec | None) -> bool:
    return one is not None and one == other


def _is_string(policy: str) -> bool:
    """Whether a policy's name is the string that it was given as."""
    if policy in NAMED:
        return False
    try:
        PolicySpec.parse(policy)
    except SpecError:
        return False
    return True


def _recipe_name(run: Run, policy: str, decimals: int) -> str:
    record = run.one(QualityRecord, policy=policy)
    nbytes = record.resident_nbytes if record else resident_nbytes(run).get(policy)
    kv = f" with K and V {record.kv}" if record and record.kv not in (None, "chosen") else ""
    return recipe_name(nbytes, decimals, kv)


def legend_name(run: Run, policy: str, called: str) -> str:
    """The series that a policy is drawn in: its own, but for the recipes made here, which are many."""
    record = made_recipes(run).get(policy)
    if record is None:
        return called
    return "recipes" if record.kv in (None, "chosen") else f"recipes, K and V {record.kv}"
