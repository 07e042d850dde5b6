"""A run beside an older one: how the two differ in what they were made with, and how every value changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from epic_quant.records import METRICS, Metric, Record
from epic_quant.results.run import Run

Key = tuple[str, frozenset[tuple[str, str]]]

# Times are only held against those of the same one of these.
_MACHINE = ("cpu", "isa", "threads", "platform")
# Facts that are measured anew each time, or that follow from others.
_NOT_COMPARED = ("measured", "read_bandwidth_gbs", "policies", "missing", "failed")

# Two times closer than this part of the older one are called the same: so much they vary from run to run.
TIME_NOISE = 0.1
# What sums in another order, or another processor, may make of the same value.
_ROUNDING, _ROUNDING_AT_ZERO = 1e-6, 1e-9


@dataclass(frozen=True)
class Change:
    """One metric of one thing, before and now; None where it could not be measured."""

    subject: str
    labels: Mapping[str, str]
    metric: Metric
    before: float | None
    now: float | None

    @property
    def relative(self) -> float | None:
        """As `relative_change`."""
        return relative_change(self.before, self.now)

    @property
    def verdict(self) -> Literal["better", "worse", "same"] | None:
        """Its verdict; None where one of the two is missing."""
        if self.before is None or self.now is None:
            return None
        noise = TIME_NOISE * self.before if is_time(self.metric) else rounding(self.metric, self.before)
        # Infinity less infinity is no number.
        if self.before == self.now or abs(self._change) <= noise:
            return "same"
        return "better" if (self._change < 0) == (self.metric.better == "lower") else "worse"

    @property
    def _change(self) -> float:
        assert self.before is not None
        assert self.now is not None
        return self.now - self.before


@dataclass(frozen=True)
class Difference:
    """A fact that the runs do not share, as text; None in a run that lacks it."""

    fact: str
    before: str | None
    now: str | None


@dataclass(frozen=True)
class Comparison:
    """`changes` of all that both runs measured, things that one of them has alone, and whether times are among them."""

    differences: tuple[Difference, ...]
    changes: tuple[Change, ...]
    only_before: tuple[Record, ...]
    only_now: tuple[Record, ...]
    with_times: bool


def compare(run: Run, baseline: Run, *, times: bool = False) -> Comparison:
    """Every value of the run beside the baseline's; times only on the same machine, or with `times`."""
    with_times = times or same_machine(run, baseline)
    now, before = measured(run), measured(baseline)
    changes = (change for key, one in now.items() if key in before for change in _changes(before[key], one))
    return Comparison(
        tuple(_differences(run.facts, baseline.facts)),
        tuple(change for change in changes if with_times or not is_time(change.metric)),
        tuple(one for key, one in before.items() if key not in now),
        tuple(one for key, one in now.items() if key not in before),
        with_times,
    )


def measured(run: Run) -> dict[Key, Record]:
    """All that a run measured, in its order, by what it is."""
    return {(record.subject, frozenset(record.labels.items())): record for record in run.records}


def relative_change(before: float | None, now: float | None) -> float | None:
    """The change as a part of the older value's magnitude; None where that is 0 or one of the two is missing."""
    return None if now is None or not before else (now - before) / abs(before)


def same_machine(run: Run, other: Run) -> bool:
    """Whether times of the two can be held against each other: same processor, threads and system."""
    return all(run.facts.get(name) == other.facts.get(name) for name in _MACHINE)


def is_time(metric: Metric) -> bool:
    """Whether the metric depends on the machine."""
    return metric.unit == "s"


def rounding(metric: Metric, value: float) -> float:
    """How far another value may be off for both to be one; bytes are exact."""
    return 0.0 if metric.unit == "B" or math.isinf(value) else max(_ROUNDING * abs(value), _ROUNDING_AT_ZERO)


def _changes(before: Record, now: Record) -> Iterator[Change]:
    for name in dict.fromkeys([*now.metrics, *before.metrics]):
        old, new = before.metrics.get(name), now.metrics.get(name)
        if old is not None or new is not None:
            yield Change(now.subject, now.labels, METRICS[name], old, new)


def _differences(now: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[Difference]:
    new, old = dict(_flat(now)), dict(_flat(before))
    for fact in dict.fromkeys([*old, *new]):
        if old.get(fact) != new.get(fact):
            yield Difference(fact, old.get(fact), new.get(fact))


def _flat(facts: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name} ")
        elif name not in _NOT_COMPARED and value is not None:
            yield f"{above}{name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)
