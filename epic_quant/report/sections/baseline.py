"""How every value changed since an older run, grouped by metric."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from epic_quant.records import METRICS, Metric, Record
from epic_quant.report.blocks import Block, Bullets, Heading, Paragraph, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import MISSING, change, with_unit
from epic_quant.results.comparison import TIME_NOISE, Change, Comparison, Difference, is_time
from epic_quant.results.gate import labels_text

_DIGITS = 4
# What a reader looks for first comes first.
_COUNTED = {"worse": "worse", None: "in one run alone", "better": "better", "same": "unchanged"}
_ORDER = list(_COUNTED)

_CHANGES: tuple[Column[Change], ...] = (
    Column("subject", lambda one: one.subject, text=True),
    Column("of", lambda one: labels_text(one.labels), code, text=True),
    Column("is", lambda one: one.verdict or MISSING, text=True),
    Column("baseline", lambda one: _value(one, one.before)),
    Column("this run", lambda one: _value(one, one.now)),
    Column("change", lambda one: one.relative, change),
)
_DIFFERENCES: tuple[Column[Difference], ...] = (
    Column("fact", lambda one: one.fact.replace("_", " "), text=True),
    Column("baseline", lambda one: one.before, lambda text: _fact(text), text=True),
    Column("this run", lambda one: one.now, lambda text: _fact(text), text=True),
)
_UNCHANGED: tuple[Column[tuple[Metric, int]], ...] = (
    Column("metric", lambda pair: pair[0].name, code, text=True),
    Column("values", lambda pair: pair[1]),
)


def blocks(compared: Comparison) -> list[Block]:
    """What the two runs differ in, what one of them has alone, and a table for each metric that moved."""
    found: list[Block] = [*_differences(compared), Paragraph(_times(compared))]
    found += _alone("Only the baseline measured these:", compared.only_before)
    found += _alone("Only this run measured these:", compared.only_now)
    by_metric: dict[Metric, list[Change]] = defaultdict(list)
    for one in compared.changes:
        by_metric[one.metric].append(one)
    ordered = [metric for metric in METRICS.values() if metric in by_metric]
    unmoved = []
    for metric in ordered:
        moved = sorted((one for one in by_metric[metric] if one.verdict != "same"), key=_first_worst)
        if moved:
            counts = Counter(one.verdict for one in by_metric[metric])
            found += [
                Heading(3, metric.name),
                Paragraph(f"{_counted(counts)}. {_meaning(metric)}"),
                table(_CHANGES, moved),
            ]
        else:
            unmoved.append((metric, len(by_metric[metric])))
    if unmoved:
        found += [Heading(3, "Unchanged"), table(_UNCHANGED, unmoved)]
    return found


def findings(compared: Comparison) -> list[str]:
    """How much got worse and better, and what most; times apart, since they always move."""
    if not compared.changes:
        return ["The baseline measured nothing that this run measured."]
    times = Counter(one.verdict for one in compared.changes if is_time(one.metric))
    others = [one for one in compared.changes if not is_time(one.metric)]
    found = []
    if others:
        found.append(f"Against the baseline: {_counted(Counter(one.verdict for one in others))}.")
    for verdict, called in (("worse", "loss"), ("better", "gain")):
        moved = [one for one in others if one.verdict == verdict and one.relative is not None]
        if moved:
            most = max(moved, key=lambda one: abs(one.relative or 0))
            found.append(
                f"The largest {called} against the baseline: {code(most.metric.name)} of {_what(most)} went from "
                f"{_value(most, most.before)} to {_value(most, most.now)} ({change(most.relative)})."
            )
    if times:
        found.append(f"Times against the baseline: {_counted(times)}.")
    return found


def _differences(compared: Comparison) -> list[Block]:
    if not compared.differences:
        return [Paragraph("Both runs name the same checkpoint, machine, versions, policies and command.")]
    return [Paragraph("The runs differ in:"), table(_DIFFERENCES, compared.differences)]


def _fact(text: str | None) -> str:
    return code(text) if text else MISSING


def _times(compared: Comparison) -> str:
    if compared.with_times:
        return f"Times that moved by less than {TIME_NOISE:.0%} are counted as unchanged."
    return "Times are not compared: the runs are of different machines or threads. With `--compare-times` they are."


def _alone(title: str, things: Iterable[Record]) -> list[Block]:
    by_subject: dict[str, list[str]] = defaultdict(list)
    for one in things:
        by_subject[one.subject].append(code(labels_text(one.labels)))
    items = tuple(f"{subject}: {', '.join(names)}" for subject, names in by_subject.items())
    return [Paragraph(title), Bullets(items)] if items else []


def _first_worst(one: Change) -> tuple[int, float]:
    return _ORDER.index(one.verdict), -abs(one.relative or 0)


def _counted(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{counts[verdict]} {called}" for verdict, called in _COUNTED.items() if counts[verdict])


def _meaning(metric: Metric) -> str:
    return f"{metric.meaning[0].upper()}{metric.meaning[1:]}; {metric.better} is better."


def _what(one: Change) -> str:
    return f"{one.subject} {code(labels_text(one.labels))}" if one.labels else one.subject


def _value(one: Change, value: float | None) -> str:
    return with_unit(one.metric, value, _DIGITS)
