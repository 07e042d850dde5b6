"""Which tensors it is: the divergence that one class alone causes at each width, with all else in bf16."""

from __future__ import annotations

import re

from epic_quant.records import Record
from epic_quant.report import plots
from epic_quant.report.blocks import Block, Figure, Heading, Paragraph, Table, code
from epic_quant.report.formatting import megabytes, significant
from epic_quant.report.sections.quality import with_error
from epic_quant.results.run import Run
from epic_quant.results.sensitivities import CALIBRATION, EVALUATION

ALL_LAYERS = "all layers"


def blocks(run: Run) -> list[Block]:
    """The heat map, then a table for each text: divergence, bytes saved, and the one over the other."""
    found: list[Block] = [
        Paragraph(
            "KL divergence in nats a token of one tensor class quantized and all else as it is. It is judged on the "
            "evaluation text; recipes are made from the same on the calibration text."
        ),
        *_figure(run),
    ]
    for text in run.labels("sensitivity", "text"):
        rows = tuple(
            (
                f"{record.labels['tensor_class']}{_layer(record)} {code(record.labels['spec'])}",
                with_error(record.metrics.get("kl_divergence"), record.metrics.get("kl_se")),
                megabytes(record.metrics.get("saved_nbytes")),
                significant(record.metrics.get("kl_per_mb")),
            )
            for record in run.select("sensitivity", text=text)
        )
        columns = ("one class alone", "KL divergence", "saved, MB", "KL divergence a MB saved")
        found += [Heading(3, f"On the {text} text"), Table(columns, rows)]
    return found


def findings(run: Run) -> list[str]:
    """The class that costs most for each MB saved, of all specs and at each, and the one that costs least."""
    costs = {
        (record.labels["tensor_class"], record.labels["spec"]): cost
        for record in run.select("sensitivity", text=_text(run))
        if "layer" not in record.labels and (cost := record.metrics.get("kl_per_mb")) is not None
    }
    if not costs:
        return []
    dearest, cheapest = (choose(costs, key=lambda key: costs[key]) for choose in (max, min))
    by_spec = []
    for width in dict.fromkeys(_width(spec) for _, spec in costs):
        inside = {tensor_class: cost for (tensor_class, spec), cost in costs.items() if _width(spec) == width}
        if len(inside) > 1:
            by_spec.append(f"{code(width)} {max(inside, key=lambda key: inside[key])}")
    at_each = f"; at each width: {', '.join(by_spec)}" if by_spec else ""
    return [
        f"Largest KL divergence for each MB saved: {_cost(dearest, costs[dearest])}{at_each}. "
        f"Smallest: {_cost(cheapest, costs[cheapest])}."
    ]


def _cost(key: tuple[str, str], cost: float) -> str:
    return f"{key[0]} under {code(key[1])} ({significant(cost)} nats a token and MB)"


def _text(run: Run) -> str:
    """What is judged is judged on the evaluation text, and on what there is where that was not run."""
    return EVALUATION if run.select("sensitivity", text=EVALUATION) else CALIBRATION


def _width(spec: str) -> str:
    """A spec without its group, which is smaller for classes of short rows: what classes are compared at."""
    return re.sub(r"-g\d+", "", spec)


def _layer(record: Record) -> str:
    return f", layer {record.labels['layer']}" if "layer" in record.labels else ""


def _figure(run: Run) -> list[Block]:
    cells = []
    for record in run.select("sensitivity", text=_text(run)):
        labels, divergence = record.labels, record.metrics.get("kl_divergence")
        if plots.drawable(divergence):
            whole = "layer" not in labels
            panel, column = (ALL_LAYERS, _width(labels["spec"])) if whole else (labels["spec"], labels["layer"])
            cells.append(plots.Cell(panel, labels["tensor_class"], column, divergence))
    if not cells:
        return []
    panels = ", ".join(dict.fromkeys(cell.panel for cell in cells))
    low, high = (choose(cells, key=lambda cell: cell.value) for choose in (min, max))
    alt = (
        f"KL divergence in nats a token as a heat map, a row for each tensor class, a panel for each of {panels}; from "
        f"{significant(low.value)} of {low.row} {low.column} to {significant(high.value)} of {high.row} {high.column}"
    )
    return [Figure("sensitivity-heat-map.svg", alt, plots.heat_map(cells))]
