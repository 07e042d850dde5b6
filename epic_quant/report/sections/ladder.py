"""Every scheme on every tensor class, in the order of bits, against the bounds of a Gaussian source."""

from __future__ import annotations

import math

from epic_quant.records import Record
from epic_quant.report.blocks import Block, Heading, Paragraph, Table, code
from epic_quant.report.formatting import significant
from epic_quant.report.sections.weights import error_figure
from epic_quant.results.run import Run

CONTROL = "gaussian control"

_COLUMNS = {
    "rel_l2": "relative L2",
    "gaussian_rel_l2": "the same of Gaussian noise",
    "output_rel_l2": "output relative L2",
    "shannon_gap_db": "over Shannon, dB",
    "lloyd_max_gap_db": "over Lloyd-Max, dB",
}


def blocks(run: Run) -> list[Block]:
    """The shapes of the classes' distributions, the plot, and a table for each class."""
    classes = run.labels("ladder", "tensor_class")
    shapes = tuple(
        (
            name,
            significant(run.value("ladder", "kurtosis", tensor_class=name)),
            significant(run.value("ladder", "absmax_over_std", tensor_class=name)),
        )
        for name in classes
    )
    found: list[Block] = [
        Paragraph(
            "How far the weights are from a Gaussian, whose kurtosis is 3, and how far out their largest one is."
        ),
        Table(("tensor class", "kurtosis", "absmax / standard deviation"), shapes),
        *error_figure(run.select("ladder"), "error-against-bits.svg"),
    ]
    for name in classes:
        rows = (
            (
                code(record.labels["spec"]),
                significant(record.metrics.get("bits_per_weight"), 4),
                *(significant(record.metrics.get(metric)) for metric in _COLUMNS),
            )
            for record in sorted(run.select("ladder", tensor_class=name), key=_bits)
        )
        found += [Heading(3, name), Table(("spec", "bits per weight", *_COLUMNS.values()), tuple(rows))]
    return found


def findings(run: Run) -> list[str]:
    """For each class, the scheme that comes nearest to Shannon's bound."""
    nearest = []
    for name in run.labels("ladder", "tensor_class"):
        gaps = {
            record.labels["spec"]: gap
            for record in run.select("ladder", tensor_class=name)
            if (gap := record.metrics.get("shannon_gap_db")) is not None
        }
        if gaps and name != CONTROL:
            spec = min(gaps, key=lambda key: gaps[key])
            nearest.append(f"{code(spec)} on {name} ({significant(gaps[spec])} dB)")
    return [f"Least above the bound that Shannon sets for a Gaussian: {', '.join(nearest)}."] if nearest else []


def _bits(record: Record) -> float:
    bits = record.metrics.get("bits_per_weight")
    return math.inf if bits is None else bits
