"""Every spec on every tensor class, in the order of bits, against the bounds of a Gaussian source."""

from __future__ import annotations

import math

from epic_quant.records.subjects import LadderRecord
from epic_quant.report.analysis.weights import nearest_to_shannon
from epic_quant.report.blocks import Block, Heading, Paragraph, code
from epic_quant.report.columns import Column, table
from epic_quant.report.error_plot import error_over_bits
from epic_quant.report.formatting import significant
from epic_quant.results.run import Run, distinct

_SHAPE: tuple[Column[LadderRecord], ...] = (
    Column("tensor class", lambda one: one.tensor_class, text=True),
    Column("kurtosis", lambda one: one.kurtosis, significant),
    Column("absmax / standard deviation", lambda one: one.absmax_over_std, significant),
)
_RUNGS: tuple[Column[LadderRecord], ...] = (
    Column("spec", lambda one: str(one.spec), code, text=True),
    Column("bits per weight", lambda one: one.bits_per_weight, lambda bits: significant(bits, 4)),
    Column("relative L2", lambda one: one.rel_l2, significant),
    Column("the same of Gaussian noise", lambda one: one.gaussian_rel_l2, significant),
    Column("output relative L2", lambda one: one.output_rel_l2, significant),
    Column("over Shannon, dB", lambda one: one.shannon_gap_db, significant),
    Column("over Lloyd-Max, dB", lambda one: one.lloyd_max_gap_db, significant),
)


def blocks(run: Run) -> list[Block]:
    """The shapes of the classes' distributions, the plot, and a table for each class."""
    records = run.of(LadderRecord)
    classes = distinct(one.tensor_class for one in records)
    found: list[Block] = [
        Paragraph("How near the weights are to a Gaussian, whose kurtosis is 3, and how large their largest one is."),
        table(_SHAPE, [run.of(LadderRecord, tensor_class=name)[0] for name in classes]),
        *error_over_bits([(one.tensor_class, one.spec, one) for one in records], "error-against-bits.svg"),
    ]
    for name in classes:
        rungs = sorted(run.of(LadderRecord, tensor_class=name), key=_bits)
        found += [Heading(3, name), table(_RUNGS, rungs)]
    return found


def findings(run: Run) -> list[str]:
    """For each class, the spec that comes nearest to Shannon's bound."""
    nearest = [
        f"{code(str(one.spec))} on {one.tensor_class} ({significant(one.shannon_gap_db)} dB)"
        for one in nearest_to_shannon(run)
    ]
    return [f"Nearest to Shannon's bound for a Gaussian: {', '.join(nearest)}."] if nearest else []


def _bits(record: LadderRecord) -> float:
    return math.inf if record.bits_per_weight is None else record.bits_per_weight
