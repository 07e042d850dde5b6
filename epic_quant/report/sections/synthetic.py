"""Specs on synthetic weights of known distribution: how near they come to the limits, and how fast they quantize."""

from __future__ import annotations

from functools import partial

from epic_quant.records.subjects import GAUSSIAN, SyntheticRecord
from epic_quant.report.analysis.gaussian import shannon
from epic_quant.report.analysis.weights import ORIGINAL, e4b_seconds, speed_gbs, synthetic_specs
from epic_quant.report.blocks import Block, Paragraph, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import MISSING, significant, times
from epic_quant.results.run import Run, distinct

_SPEC: Column[SyntheticRecord] = Column("spec", lambda one: str(one.spec), code, text=True)


def blocks(run: Run) -> list[Block]:
    """Error by distribution, then the speed of quantizing beside the original's format."""
    rows = synthetic_specs(run)
    reference = speed_gbs(run.one(SyntheticRecord, spec=ORIGINAL, distribution=GAUSSIAN))
    columns: list[Column[SyntheticRecord]] = [
        _SPEC,
        Column("bits per weight", lambda one: one.bits_per_weight, lambda bits: significant(bits, 4)),
        Column(
            "Shannon's bound",
            lambda one: None if one.bits_per_weight is None else shannon(one.bits_per_weight),
            significant,
        ),
    ]
    for name in distinct(one.distribution for one in run.of(SyntheticRecord)):
        columns.append(Column(name, partial(_error, run, name), significant))

    def speed(gbs: float | None) -> str:
        return MISSING if gbs is None else f"{significant(gbs)} ({times(gbs, reference)})"

    speeds: list[Column[SyntheticRecord]] = [
        _SPEC,
        Column("GB/s", speed_gbs, speed),
        Column("E4B would take", e4b_seconds, _minutes),
    ]
    return [
        Paragraph(
            "Relative L2 on seeded synthetic weights from three distributions of unit variance. Shannon's bound is "
            "that of a Gaussian at the same bits; a Hadamard rotation (`+had`) makes the other two look Gaussian."
        ),
        table(columns, rows),
        Paragraph(
            f"Speed of quantizing and packing, in GB/s of the weights in bf16, with the ratio to `{ORIGINAL}`, the "
            "original's format, in brackets; and the time that all matrices of E4B would take at that speed."
        ),
        table(speeds, [one for one in rows if one.distribution == GAUSSIAN]),
    ]


def findings(run: Run) -> list[str]:
    """The slowest spec's time for the whole of E4B."""
    timed = [(seconds, str(one.spec)) for one in synthetic_specs(run) if (seconds := e4b_seconds(one)) is not None]
    if not timed:
        return []
    seconds, spec = max(timed)
    return [f"At the speed measured here, quantizing E4B takes at most {_minutes(seconds)} ({code(spec)})."]


def _error(run: Run, distribution: str, record: SyntheticRecord) -> float | None:
    error: float | None = run.value(SyntheticRecord, "rel_l2", spec=record.spec, distribution=distribution)
    return error


def _minutes(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{significant(seconds / 60, 2)} min"
