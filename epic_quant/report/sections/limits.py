"""What a run was held to, and what did not keep to it."""

from __future__ import annotations

from collections.abc import Sequence

from epic_quant.report import terminal
from epic_quant.report.blocks import Block, Paragraph, Table, code
from epic_quant.report.formatting import change, with_unit
from epic_quant.report.sections.baseline import where
from epic_quant.results.gate import Judgement

_DIGITS = 4


def blocks(judged: Sequence[Judgement]) -> list[Block]:
    """The limits, and below them a table of what failed."""
    limits = ", ".join(dict.fromkeys(code(one.condition.text) for one in judged))
    failed = failures(judged)
    return [Paragraph(f"Held to {limits}: {summary(judged)}."), *([failed] if failed.rows else [])]


def summary(judged: Sequence[Judgement]) -> str:
    """One clause for a terminal or a sentence."""
    failed, every = sum(one.fails for one in judged), len(judged)
    return f"{failed} of {every} values past their limit" if failed else f"{every} of {every} values within their limit"


def told(judged: Sequence[Judgement]) -> str:
    """The same for a terminal, above it a table of what failed."""
    failed = failures(judged)
    return f"{terminal.render(failed)}\n\n{summary(judged)}" if failed.rows else summary(judged)


def failures(judged: Sequence[Judgement]) -> Table:
    """Each value that fails, beside its limit, and for a relative one what it was and how it changed."""
    rows = tuple(_row(one) for one in judged if one.fails)
    return Table(("metric", "subject", "of", "value", "limit", "baseline", "change"), rows, num_text_columns=3)


def _row(one: Judgement) -> tuple[str, ...]:
    condition = one.condition
    moved = (one.value - one.before) / abs(one.before) if one.value is not None and one.before else None
    return (
        code(condition.metric.name),
        one.subject,
        code(where(one.labels)),
        with_unit(condition.metric, one.value, _DIGITS),
        # An absolute limit reads as it was written.
        with_unit(condition.metric, one.limit, _DIGITS) if condition.relative else condition.text.rpartition(":")[2],
        with_unit(condition.metric, one.before, _DIGITS),
        change(moved),
    )
