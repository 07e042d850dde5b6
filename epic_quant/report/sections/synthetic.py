"""Schemes on synthetic weights of known distribution: how near they come to the limits, and how fast they quantize."""

from __future__ import annotations

from epic_quant.report.blocks import Block, Paragraph, Table, code
from epic_quant.report.formatting import MISSING, quotient, significant, times
from epic_quant.report.gaussian import shannon
from epic_quant.results.run import Run

GAUSSIAN = "Gaussian"
ORIGINAL = "absmax4"


def blocks(run: Run) -> list[Block]:
    """Error by distribution, then the speed of quantizing beside the original's scheme."""
    return [
        Paragraph(
            "Relative L2 on seeded synthetic weights, no model's, of three distributions of unit variance. Shannon's "
            "bound is a Gaussian's at the same bits; a rotation (`+had`) makes the other two look Gaussian."
        ),
        _errors(run),
        Paragraph(
            f"Speed of quantizing and packing, in GB/s of the weights in bf16, in brackets the ratio to `{ORIGINAL}`, "
            "the original's scheme; and at that speed the time for all matrices that E4B multiplies by."
        ),
        _speeds(run),
    ]


def findings(run: Run) -> list[str]:
    """The slowest scheme's time for the whole of E4B."""
    times_s = {spec: seconds for spec in _specs(run) if (seconds := _e4b_seconds(run, spec)) is not None}
    if not times_s:
        return []
    slowest = max(times_s, key=lambda spec: times_s[spec])
    return [f"At the speed measured here, quantizing E4B takes at most {_minutes(times_s[slowest])} ({code(slowest)})."]


def _specs(run: Run) -> list[str]:
    def bits(spec: str) -> float:
        return run.value("synthetic", "bits_per_weight", spec=spec) or 0.0

    return sorted(run.labels("synthetic", "spec"), key=bits)


def _errors(run: Run) -> Table:
    distributions = run.labels("synthetic", "distribution")
    rows = []
    for spec in _specs(run):
        bits = run.value("synthetic", "bits_per_weight", spec=spec)
        errors = [run.value("synthetic", "rel_l2", spec=spec, distribution=name) for name in distributions]
        bound = MISSING if bits is None else significant(shannon(bits))
        rows.append((code(spec), significant(bits, 4), bound, *map(significant, errors)))
    return Table(("spec", "bits per weight", "Shannon's bound", *distributions), tuple(rows))


def _speeds(run: Run) -> Table:
    reference = _gbs(run, ORIGINAL)
    rows = []
    for spec in _specs(run):
        speed = _gbs(run, spec)
        cell = MISSING if speed is None else f"{significant(speed)} ({times(speed, reference)})"
        rows.append((code(spec), cell, _minutes(_e4b_seconds(run, spec))))
    return Table(("spec", "GB/s", "E4B would take"), tuple(rows))


def _gbs(run: Run, spec: str) -> float | None:
    """The synthetic Gaussian's bytes in bf16 over the time of quantizing it, in GB/s."""
    nbytes = run.value("synthetic", "bytes_read", spec=spec, distribution=GAUSSIAN)
    speed = quotient(nbytes, run.value("synthetic", "time_s", spec=spec, distribution=GAUSSIAN))
    return None if speed is None else speed / 1e9


def _e4b_seconds(run: Run, spec: str) -> float | None:
    """Seconds for E4B's matrices, two bytes a weight, at the speed measured on the synthetic one."""
    records = run.select("synthetic", spec=spec, distribution=GAUSSIAN)
    weights = records[0].details.get("e4b_weights") if records else None
    return quotient(None if weights is None else 2e-9 * weights, _gbs(run, spec))


def _minutes(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{significant(seconds / 60, 2)} min"
