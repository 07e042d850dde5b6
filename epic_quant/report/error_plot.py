"""The plot of error over bits that weights and the ladder share."""

from __future__ import annotations

from collections.abc import Iterable

from epic_quant.records.subjects import LadderRecord, WeightsRecord
from epic_quant.report import plots
from epic_quant.report.analysis.gaussian import LLOYD_MAX, shannon
from epic_quant.report.analysis.weights import series
from epic_quant.report.blocks import Block, Paragraph
from epic_quant.report.formatting import significant
from epic_quant.spec import WeightSpec

# Beyond, errors are too small to distinguish formats, and the axis would be mostly empty.
_MAX_BITS = 6.0


def error_over_bits(
    records: Iterable[tuple[str, WeightSpec, WeightsRecord | LadderRecord]], file_name: str
) -> list[Block]:
    """Relative L2 over bits per weight by class and spec, with the bounds of a Gaussian source."""
    points = {}
    for tensor_class, spec, one in records:
        if one.rel_l2 is not None and one.bits_per_weight is not None and one.bits_per_weight <= _MAX_BITS:
            points[tensor_class, spec] = plots.Point(
                tensor_class, series(spec), one.bits_per_weight, one.rel_l2, str(spec)
            )
    bits = (0.9, max([4.2, *(point.x + 0.2 for point in points.values())]))
    drawn = plots.scatter(
        file_name,
        plots.Scatter(
            x=plots.Axis(
                "bits per weight, with scales and other metadata",
                lambda value: f"{significant(value, 4)} bits a weight",
                log=False,
                limits=bits,
            ),
            y=plots.Axis("relative L2 error", lambda value: f"relative L2 {significant(value)}"),
            points=list(points.values()),
            lines=[
                plots.Line("Shannon's bound", [(rate, shannon(rate)) for rate in bits]),
                plots.Line("Lloyd-Max, Gaussian", list(LLOYD_MAX.items()), dashed=True),
            ],
            joined=True,
            size=(5.0, 3.2),
        ),
    )
    about = Paragraph(
        "Shannon's bound and Lloyd-Max are for a Gaussian source. Weights whose scale varies from group to group can "
        f"lie below either. Exact copies and anything over {significant(_MAX_BITS, 1)} bits are not drawn."
    )
    return [*drawn, about] if drawn else []
