"""Hits of the PLE row cache over resident MB."""

from __future__ import annotations

import math
from functools import partial

from epic_quant.records.subjects import LOWEST_IDS, OPTIMUM, PLEHitsRecord
from epic_quant.report import plots
from epic_quant.report.analysis import ple
from epic_quant.report.blocks import Block, Heading, Paragraph, Table
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import MISSING, megabytes, ratio, scaled, significant
from epic_quant.results.run import Run, distinct


def blocks(run: Run) -> list[Block]:
    """The plot, then for each trace hit rates by residency and capacity and the MB that reach the targets."""
    found: list[Block] = [
        Paragraph(
            "Share of token lookups that are answered from RAM. The first half of each trace warms the caches and "
            "chooses the most frequent rows; the second half is measured. The optimum is Belady's, with any rows "
            "resident at the start: an upper bound, which needs the future."
        ),
        *_figure(run),
    ]
    for trace in distinct(one.trace for one in run.of(PLEHitsRecord)):
        records = run.of(PLEHitsRecord, trace=trace)
        found += [Heading(3, trace), _about(records[0]), _hit_rates(records)]
    return found


def findings(run: Run) -> list[str]:
    """For each trace which residency needs the least MB for each target, and what the lowest ids give."""
    found = []
    for trace in distinct(one.trace for one in run.of(PLEHitsRecord)):
        records = run.of(PLEHitsRecord, trace=trace)
        reached = [
            f"{way.target:.0%} with {_size(way)} MB ({way.record.residency}"
            + ("" if way.of_optimum is None else f", {ratio(way.of_optimum)} the optimum's")
            + ")"
            for way in ple.best(records)
        ]
        parts = [f"PLE hits on {trace}: {'; '.join(reached) or 'no residency reaches 90% at the sizes tried'}"]
        if (lowest := ple.lowest_ids_rate(records)) is not None:
            parts.append(f"the lowest ids, as many as the original keeps, give {significant(100 * lowest)}%")
        found.append("; ".join(parts) + ".")
    return found


def key_findings(run: Run) -> list[str]:
    """Rows and MB for each target on the last trace: the user's own, or the evaluation text."""
    trace = run.of(PLEHitsRecord)[-1].trace
    reached = [
        f"{way.target:.0%} {math.ceil(way.rows):,} rows ({_size(way)} MB, {way.record.residency})"
        for way in ple.best(run.of(PLEHitsRecord, trace=trace))
    ]
    return [f"Resident PLE rows that answer so many lookups of {trace}: {', '.join(reached)}."] if reached else []


def _size(way: ple.Reached | None) -> str:
    """MB that reach a hit rate; with a sign where they are the fewest that were tried, so that fewer may do."""
    return MISSING if way is None else ("≤ " if way.is_least_tried else "") + megabytes(way.nbytes)


def _about(record: PLEHitsRecord) -> Paragraph:
    return Paragraph(
        f"{record.tokens:,} tokens, {record.distinct:,} of them distinct; {record.row_nbytes:,} bytes a row. "
        f"{significant(100 * record.met_before)}% had come before: a cache that must see a token before it holds its "
        "row cannot hit more."
    )


def _hit_rates(records: list[PLEHitsRecord]) -> Table:
    """A row for each residency: hit rates by capacity, then the MB that reach the targets."""
    columns: list[Column[PLEHitsRecord]] = [Column("hit rate, %", lambda one: one.residency, text=True)]
    for rows in sorted(records[0].capacities):
        title = f"{rows:,} rows, {megabytes(rows * records[0].row_nbytes)} MB"
        columns.append(Column(title, partial(_rate, rows), scaled(100)))
    for target in ple.TARGETS:
        columns.append(Column(f"MB for {target:.0%}", partial(ple.reach, target=target), _size))
    return table(columns, records)


def _rate(rows: int, record: PLEHitsRecord) -> float | None:
    return dict(ple.curve(record)).get(rows)


def _figure(run: Run) -> list[Block]:
    points, marks = [], []
    for one in run.of(PLEHitsRecord):
        for rows, rate in ple.curve(one):
            points.append(plots.Point(one.trace, one.residency, rows * one.row_nbytes / 1e6, rate))
        if one.residency == LOWEST_IDS and one.hit_rate is not None:
            size = one.original_rows * one.row_nbytes / 1e6
            marks.append(plots.Point(one.trace, "the original's point", size, one.hit_rate))
    plot = plots.Scatter(
        # Tables differ in the bytes of a row, so every panel has MB of its own.
        x=plots.Axis("MB of resident rows", lambda value: f"{significant(value)} MB", shared=False),
        y=plots.Axis("hit rate", lambda value: f"{significant(100 * value)}% hits", log=False, limits=(0.0, 1.02)),
        points=points,
        marks=marks,
        joined=True,
        bound=OPTIMUM,
        size=(4.6, 2.7),
    )
    return plots.scatter("ple-hits-over-bytes.svg", plot)
