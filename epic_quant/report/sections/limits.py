"""The limits of a run, and the values that failed them."""

from __future__ import annotations

from collections.abc import Sequence

from epic_quant.report import terminal
from epic_quant.report.blocks import Block, Paragraph, Table, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import change, with_unit
from epic_quant.results.gate import LimitResult, labels_text

_DIGITS = 4

_FAILURES: tuple[Column[LimitResult], ...] = (
    Column("metric", lambda one: one.condition.metric.name, code, text=True),
    Column("subject", lambda one: one.subject, text=True),
    Column("of", lambda one: labels_text(one.labels), code, text=True),
    Column("value", lambda one: _value(one, one.value)),
    Column("limit", lambda one: _limit(one)),
    Column("baseline", lambda one: _value(one, one.before)),
    Column("change", lambda one: one.relative_change, change),
)


def blocks(results: Sequence[LimitResult]) -> list[Block]:
    """The limits, and below them a table of what failed."""
    limits = ", ".join(dict.fromkeys(code(one.condition.text) for one in results))
    failed = failures(results)
    return [Paragraph(f"Limits: {limits}. {summary_line(results)}."), *([failed] if failed.rows else [])]


def summary_line(results: Sequence[LimitResult]) -> str:
    """One clause for a terminal or a sentence."""
    failed, every = sum(one.fails for one in results), len(results)
    return f"{failed} of {every} values past their limit" if failed else f"{every} of {every} values within their limit"


def terminal_text(results: Sequence[LimitResult]) -> str:
    """The same for a terminal, above it a table of what failed."""
    failed = failures(results)
    return f"{terminal.render(failed)}\n\n{summary_line(results)}" if failed.rows else summary_line(results)


def failures(results: Sequence[LimitResult]) -> Table:
    """Each value that fails, beside its limit, and for a relative one what it was and how it changed."""
    return table(_FAILURES, [one for one in results if one.fails])


def _value(one: LimitResult, value: float | None) -> str:
    return with_unit(one.condition.metric, value, _DIGITS)


def _limit(one: LimitResult) -> str:
    """An absolute limit reads as it was written."""
    return _value(one, one.limit) if one.condition.relative else one.condition.limit_text
