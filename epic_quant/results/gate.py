"""Limits on what a run measured: `METRIC[where]:LIMIT`, absolute or relative to an older run.

A limit is on the bad side of the metric: what is better lower fails above it, what is better higher fails below it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from epic_quant.errors import GateError, unknown
from epic_quant.records import METRICS, Metric, Record
from epic_quant.results.comparison import Key, is_time, measured, relative_change, rounding, same_machine
from epic_quant.results.run import Run
from epic_quant.units import parse_nbytes

_EXAMPLES = "kl_divergence:0.05, rel_l2[class=mlp]:+5%, resident_nbytes[policy=int4-g128]:3.5GB"

# Of the option --fail-if, for parsers that fill in `%`.
METAVAR = "METRIC[LABEL=VALUE]:LIMIT"
HELP = f"end with status 1 where a value is on the bad side of its limit (repeatable): {_EXAMPLES}".replace("%", "%%")

# Short names of labels, and the subject, which selects like a label.
_ALIASES = {"class": "tensor_class"}
_SUBJECT = "subject"

_CONDITION = re.compile(r"(?P<metric>[^\[\]:]*)(?:\[(?P<where>.*)\])?:(?P<limit>[^\]]*)")
_PART = re.compile(r"\s*(?P<label>[^=,\"]+?)\s*=\s*(?:\"(?P<quoted>[^\"]*)\"|(?P<plain>[^,\"]*?))\s*(?:,|$)")
_PERCENT = re.compile(r"(?P<sign>[+-]?)(?P<number>[0-9.]+) ?%")
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


@dataclass(frozen=True)
class Condition:
    """A limit on a metric of everything that bears some labels.

    `limit` is in the metric's unit (bytes, seconds …), or where it is `relative` a part of the baseline's value that is
    added to it: 0.05 for +5%.
    """

    text: str
    metric: Metric
    where: Mapping[str, str]
    limit: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read `METRIC[label=value,…]:LIMIT`; a value with a comma stands in double quotes.

        LIMIT is a number, in bytes also as 3.5GB and in seconds as 2ms, or for a relative one +5% or -2%. The label
        `class` is `tensor_class`, and `subject` what was measured. Raises GateError.
        """
        found = _CONDITION.fullmatch(text.strip())
        if found is None:
            raise GateError(f"{text!r} is not a condition METRIC[label=value,…]:LIMIT, such as {_EXAMPLES}")
        name = found["metric"].strip()
        if name not in METRICS:
            raise GateError(unknown("metric", name, METRICS))
        metric = METRICS[name]
        where = {} if found["where"] is None else _where(text, found["where"])
        return cls(text.strip(), metric, where, *_limit(text, metric, found["limit"].strip()))

    @property
    def limit_text(self) -> str:
        """The limit as it was written."""
        return self.text.rpartition(":")[2]

    def selects(self, one: Record) -> bool:
        """Whether the condition is on this."""
        return self.metric.name in one.metrics and all(_label(one, name) == value for name, value in self.where.items())


@dataclass(frozen=True)
class LimitResult:
    """One value under a condition: what it is, what it was, its limit in the metric's unit, and whether it fails.

    `value` and `before` are None where there is none, `limit` where there is none to compute it from.
    """

    condition: Condition
    subject: str
    labels: Mapping[str, str]
    value: float | None
    before: float | None
    limit: float | None

    @property
    def relative_change(self) -> float | None:
        """As `comparison.relative_change`."""
        return relative_change(self.before, self.value)

    @property
    def fails(self) -> bool:
        """Also where the value or the limit is missing."""
        if self.value is None or self.limit is None or math.isnan(self.value):
            return True
        return self.value > self.limit if self.condition.metric.better == "lower" else self.value < self.limit


def labels_text(labels: Mapping[str, str]) -> str:
    """Labels as a condition selects by them: a value with a comma stands in double quotes."""
    return ",".join(f'{name}="{value}"' if "," in value else f"{name}={value}" for name, value in labels.items())


def check_limits(
    conditions: Sequence[Condition], run: Run, baseline: Run | None = None, *, times: bool = False
) -> list[LimitResult]:
    """Every value that the conditions are on.

    A relative condition also selects what only the baseline has: that fails, since this run did not measure it. Raises
    GateError on a condition that selects nothing, on a relative one without a baseline,
    and on a relative one of a time from another machine, but with `times`.
    """
    return [result for condition in conditions for result in _check(condition, run, baseline, times)]


def check_baseline(conditions: Sequence[Condition], given: bool) -> None:
    """Raise GateError where a condition is relative and no baseline is given."""
    relative = next((condition for condition in conditions if condition.relative), None)
    if relative is not None and not given:
        raise GateError(f"{relative.text}: relative to what? Name an older run with --baseline")


def _check(condition: Condition, run: Run, baseline: Run | None, times: bool) -> Iterator[LimitResult]:
    check_baseline([condition], baseline is not None)
    now = measured(run)
    before: Mapping[Key, Record] = {}
    if condition.relative and baseline is not None:
        if is_time(condition.metric) and not times and not same_machine(run, baseline):
            raise GateError(
                f"{condition.text}: the baseline's times are of another machine; with --compare-times they count"
            )
        before = measured(baseline)
    things = {**before, **now}
    # A value may be on one side only: new, removed, or without the metric.
    selected = dict.fromkeys(key for side in (now, before) for key, one in side.items() if condition.selects(one))
    if not selected:
        raise GateError(f"{condition.text}: {_why_empty(condition, list(things.values()))}")
    for key in selected:
        value, old = (side[key].metrics.get(condition.metric.name) if key in side else None for side in (now, before))
        limit = condition.limit if not condition.relative else _relative_limit(condition, old)
        yield LimitResult(condition, things[key].subject, things[key].labels, value, old, limit)


def _relative_limit(condition: Condition, before: float | None) -> float | None:
    if before is None or not math.isfinite(before):
        return None
    slack = rounding(condition.metric, before)
    return before + condition.limit * abs(before) + (slack if condition.metric.better == "lower" else -slack)


def _label(one: Record, name: str) -> str | None:
    return one.subject if name == _SUBJECT else one.labels.get(name)


def _why_empty(condition: Condition, things: Sequence[Record]) -> str:
    """Why a condition selects nothing."""
    with_metric = [one for one in things if condition.metric.name in one.metrics]
    if not with_metric:
        names = sorted({name for one in things for name in one.metrics})
        return f"nothing in this run has the metric {condition.metric.name}; it has {', '.join(names)}"
    labels = {_SUBJECT, *(label for one in with_metric for label in one.labels)}
    for name, wanted in condition.where.items():
        if name not in labels:
            hint = "; a value with a comma stands in double quotes" if len(condition.where) > 1 else ""
            return unknown(f"label of {condition.metric.name}", name, labels) + hint
        values = {value for one in with_metric if (value := _label(one, name)) is not None}
        if wanted not in values:
            return unknown(f"{name} of {condition.metric.name}", wanted, values)
    return "nothing in this run bears all these labels together"


def _where(text: str, where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    position = 0
    while position < len(where):
        part = _PART.match(where, position)
        if part is None:
            raise GateError(f"{text}: {where[position:]!r} is not label=value")
        label = _ALIASES.get(part["label"], part["label"])
        if label in found:
            raise GateError(f"{text}: names {part['label']} twice")
        found[label] = part["plain"] if part["quoted"] is None else part["quoted"]
        position = part.end()
    if not found or where.rstrip().endswith(","):
        raise GateError(f"{text}: expected label=value between the brackets")
    return found


def _limit(text: str, metric: Metric, limit: str) -> tuple[float, bool]:
    """The limit's number, and whether it is relative."""
    percent = _PERCENT.fullmatch(limit)
    try:
        if percent is not None:
            if not percent["sign"]:
                raise GateError(f"{text}: {limit} of what? Relative to the baseline it is +{limit} or -{limit}")
            return float(percent["sign"] + percent["number"]) / 100, True
        value = _absolute(metric, limit)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        units = {"B": "3.5GB, ", "s": "2ms, "}.get(metric.unit, "0.05, ")
        raise GateError(f"{text}: {limit!r} is not a limit, such as {units}+5% or -2%")
    return value, False


def _absolute(metric: Metric, limit: str) -> float:
    if metric.unit == "B":
        return parse_nbytes(limit)
    if metric.unit == "s":
        unit = re.search(r"[a-zµ]*$", limit)
        name = unit[0] if unit else ""
        if name in _SECONDS:
            return float(limit.removesuffix(name)) * _SECONDS[name]
    return float(limit)
