"""Which tensors cost most: the divergence that one class alone causes at each width, with all else in bf16."""

from __future__ import annotations

from functools import partial

from epic_quant.records.subjects import PricesRecord, SensitivityRecord
from epic_quant.report import plots
from epic_quant.report.analysis import prices
from epic_quant.report.analysis.prices import Kind
from epic_quant.report.analysis.sensitivity import AtWidth, asked, costs, reported, width
from epic_quant.report.blocks import Block, Heading, Paragraph, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import megabytes, ratio, significant, with_error
from epic_quant.report.wording import ablation
from epic_quant.results.run import Run, distinct

ALL_LAYERS = "all layers"

_ALONE: tuple[Column[SensitivityRecord], ...] = (
    Column("one class alone", ablation, text=True),
    Column("KL divergence", lambda one: with_error(one.kl_divergence, one.kl_se)),
    Column("saved, MB", lambda one: one.saved_nbytes, megabytes),
    Column("KL divergence a MB saved", lambda one: one.kl_per_mb, significant),
)


def blocks(run: Run) -> list[Block]:
    """The heat map, then a table for each text: divergence, bytes saved, and the one over the other."""
    found: list[Block] = [
        Paragraph("KL divergence in nats a token of one tensor class quantized and all else as it is."),
        *_figure(run),
    ]
    for text in distinct(one.text for one in run.of(SensitivityRecord)):
        found += [Heading(3, f"On the {text} text"), table(_ALONE, run.of(SensitivityRecord, text=text))]
    return [*found, *_kinds(run)]


def findings(run: Run) -> list[str]:
    """The costliest and cheapest class for each MB saved, and what 8 and 4 bits cost those that people ask about."""
    found = []
    if (cost := costs(run)) is not None:
        by_width = ", ".join(f"{code(name)} {tensor_class}" for name, tensor_class in cost.by_width)
        at_each = f"; at each width: {by_width}" if by_width else ""
        found.append(
            f"Largest KL divergence for each MB saved: {_cost(cost.costliest)}{at_each}. "
            f"Smallest: {_cost(cost.cheapest)}."
        )
    answers = ((name, "; ".join(map(_answer, widths))) for name, widths in asked(run).items())
    return [*found, *(f"{name} alone: {answer}." for name, answer in answers)]


def _answer(one: AtWidth) -> str:
    """Whether that many bits cost more than computing in bf16, and how much."""
    no = "no " if one.of_noise <= 1 else ""
    cost = f"{code(one.record.spec)}, {significant(one.record.kl_divergence)} nats a token, {ratio(one.of_noise)}"
    others = f"; each MB saved costs {ratio(one.of_others)} the median of other classes" if one.of_others else ""
    return f"{one.bits} bits cost {no}more than computing in bf16 ({cost} as much{others})"


def _cost(record: SensitivityRecord) -> str:
    return f"{record.tensor_class} under {code(record.spec)} ({significant(record.kl_per_mb)} nats a token and MB)"


def _kinds(run: Run) -> list[Block]:
    """Classes by kind of tensor, which are priced and not measured; nothing where there are no prices."""
    found = prices.kinds(prices.tensors(prices.priced(run))) if run.of(PricesRecord) else []
    if not found:
        return []
    columns: list[Column[Kind]] = [
        Column("one kind alone", lambda one: one.name, code, text=True),
        Column("tensors", lambda one: one.num_tensors),
    ]
    widths = distinct(width for one in found for width in one.prices)
    columns += [Column(name, partial(_price, name), significant) for name in widths]
    return [
        Heading(3, "Kinds of tensors, predicted"),
        Paragraph(
            "Predicted KL divergence in nats a token of one kind of tensor quantized in all layers: the sum of the "
            "prices of its tensors."
        ),
        table(columns, found),
    ]


def _price(width: str, kind: Kind) -> float | None:
    return kind.prices.get(width)


def _figure(run: Run) -> list[Block]:
    cells = []
    for one in reported(run):
        if plots.drawable(one.kl_divergence):
            panel, column = (ALL_LAYERS, width(one)) if one.layer is None else (one.spec, str(one.layer))
            cells.append(plots.Cell(panel, one.tensor_class, column, one.kl_divergence))
    return plots.heat_map("sensitivity-heat-map.svg", "KL divergence in nats a token", "tensor class", cells)
