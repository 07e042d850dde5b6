"""Products with packed weights: time beside bf16's, and what part of the memory's speed they read at."""

from __future__ import annotations

from epic_quant.records.subjects import KernelsRecord
from epic_quant.report.analysis import speed
from epic_quant.report.blocks import Block, Heading, Paragraph, Table, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import MISSING, milliseconds, percent, significant, times
from epic_quant.results.run import Run, distinct


def blocks(run: Run) -> list[Block]:
    """A table for each weight and number of tokens."""
    found: list[Block] = [
        Paragraph(
            "Seeded noise in the shapes of E4B's blocks, larger than the caches. The error is that of the product "
            f"against the same stored weights in fp64. Times are medians, ratios are to `{speed.TORCH_BF16}`; with "
            "more than one token a product computes more than it reads."
        )
    ]
    for weight in distinct(one.weight for one in run.of(KernelsRecord)):
        for tokens in distinct(one.tokens for one in run.of(KernelsRecord, weight=weight)):
            found.append(Heading(3, f"{weight}, {tokens} {'token' if tokens == 1 else 'tokens'}"))
            found.append(_table(run, weight, tokens))
    return found


def findings(run: Run) -> list[str]:
    """The fastest packed product of each weight at one token."""
    return [
        f"One token by {code(one.of)}: {code(one.fastest[0])} is fastest, {significant(1 / one.fastest[1])} times as "
        f"fast as `{speed.TORCH_BF16}`."
        for one in speed.products(run)
    ]


def _table(run: Run, weight: str, tokens: int) -> Table:
    records = run.of(KernelsRecord, weight=weight, tokens=tokens)
    reference = next((one.time_s for one in records if one.how == speed.TORCH_BF16), None)
    bandwidth = run.facts.get("read_bandwidth_gbs")
    columns: list[Column[KernelsRecord]] = [
        Column("stored as, activations", lambda one: one.how, code, text=True),
        Column("computed by", lambda one: one.computed_by, lambda by: code(by) if by else MISSING, text=True),
        Column("error", lambda one: one.output_rel_l2, lambda error: significant(error, 2)),
        Column("ms", lambda one: one.time_s, milliseconds),
        Column(f"of {speed.TORCH_BF16}", lambda one: times(one.time_s, reference)),
    ]
    if tokens == 1:
        columns += [
            Column("GB/s", lambda one: speed.gbs(one.bytes_read, one.time_s), significant),
            Column("of read bandwidth", lambda one: percent(speed.gbs(one.bytes_read, one.time_s), bandwidth)),
        ]
    return table(columns, records)
