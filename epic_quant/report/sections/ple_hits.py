"""Which token ids texts use, hits of the PLE row cache over resident MB, and what a list of frequent ids saves."""

from __future__ import annotations

import math
from functools import partial

from epic_quant.records.subjects import (
    EMPTY_START,
    LOWEST_IDS,
    OPTIMUM,
    PLEHitsRecord,
    PLEStartRecord,
    PLETextRecord,
)
from epic_quant.report import plots
from epic_quant.report.analysis import ple
from epic_quant.report.blocks import Block, Heading, Paragraph, Table
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import MISSING, megabytes, ratio, scaled, significant
from epic_quant.results.run import Run, distinct


def blocks(run: Run) -> list[Block]:
    """The texts, the plot, for each trace hit rates by capacity and the MB that reach the targets, and the starts."""
    found: list[Block] = [
        *_texts(run.of(PLETextRecord)),
        Paragraph(
            "Share of token lookups that are answered from RAM. The first half of each trace warms the caches and "
            "chooses the most frequent rows; the second half is measured. The optimum is Belady's, with any rows "
            "resident at the start: an upper bound, which needs the future."
        ),
        *_figure(run),
    ]
    for trace in distinct(one.trace for one in run.of(PLEHitsRecord)):
        records = run.of(PLEHitsRecord, trace=trace)
        found += [Heading(3, trace), _about(records[0], run.one(PLETextRecord, text=trace)), _hit_rates(records)]
    return found + _starts(run.of(PLEStartRecord))


def findings(run: Run) -> list[str]:
    """How many tokens have the lowest ids; by trace which residency needs the least MB for each target; the starts."""
    found = text_findings(run)
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
    return found + start_findings(run)


def key_findings(run: Run) -> list[str]:
    """Rows and MB for each target on real token ids, and on the last trace: the user's own, or the evaluation text."""
    found = []
    traces = distinct(one.trace for one in run.of(PLEHitsRecord))
    real = {one.text for one in run.of(PLETextRecord)}
    for trace in [*(trace for trace in traces[:-1] if trace in real), traces[-1]]:
        reached = [
            f"{way.target:.0%} {math.ceil(way.rows):,} rows ({_size(way)} MB, {way.record.residency})"
            for way in ple.best(run.of(PLEHitsRecord, trace=trace))
        ]
        if reached:
            found.append(f"Resident PLE rows that answer so many lookups of {trace}: {', '.join(reached)}.")
    return found


def text_findings(run: Run) -> list[str]:
    """From the least to the most of a text's tokens that have the lowest ids."""
    records = run.of(PLETextRecord)
    known = [(text.lowest_ids, text.name) for text in ple.texts(records) if text.lowest_ids is not None]
    if len(known) < 2:
        return []
    (least, of_least), (most, of_most) = min(known), max(known)
    return [
        f"Real token ids: the {records[0].original_rows:,} lowest, which the original keeps, are from "
        f"{significant(100 * least)}% ({of_least}) to {significant(100 * most)}% ({of_most}) of the tokens of "
        f"{len(known)} texts."
    ]


def start_findings(run: Run) -> list[str]:
    """What a list of frequent ids saves an LRU of the original's rows at the start of each text."""
    found = []
    for trace in distinct(one.trace for one in run.of(PLEStartRecord)):
        records = run.of(PLEStartRecord, trace=trace, residency="lru")
        if starts := ple.starts(records):
            counts = ", ".join(f"{significant(count)} from {start}" for start, count in starts.items())
            found.append(
                f"Rows missed in the first {records[0].tokens:,} tokens of {trace}, by what an LRU of "
                f"{records[0].original_rows:,} rows starts from: {counts}."
            )
    return found


def _size(way: ple.Reached | None) -> str:
    """MB that reach a hit rate; with a sign where they are the fewest that were tried, so that fewer may do."""
    return MISSING if way is None else ("≤ " if way.is_least_tried else "") + megabytes(way.nbytes)


def _texts(records: list[PLETextRecord]) -> list[Block]:
    """Texts by the ids that they use: those of this run, then those that were measured elsewhere."""
    if not records:
        return []
    columns: list[Column[ple.Text]] = [
        Column("token ids of real text", lambda one: one.name, text=True),
        Column("figures", lambda one: "measured here" if one.is_measured else "measured elsewhere", text=True),
        Column("tokens", lambda one: one.tokens, _count),
        Column(f"ids below {records[0].original_rows:,}, %", lambda one: one.lowest_ids, scaled(100)),
    ]
    for target in records[0].rows:
        columns.append(Column(f"rows for {target}", partial(_rows, target), _count))
        columns.append(Column("MB", partial(_nbytes, target), megabytes))
    sources = distinct(one.source for one in records if one.source)
    sizes = " or ".join(f"{size:,}" for size in distinct(one.row_nbytes for one in records))
    about = (
        f"Rows are those of the best static choice, which knows all of the text; MB of bf16 rows, {sizes} bytes each."
    )
    return [table(columns, ple.texts(records)), Paragraph(" ".join([*(f"{source}." for source in sources), about]))]


def _rows(target: str, text: ple.Text) -> float | None:
    return text.rows.get(target)


def _nbytes(target: str, text: ple.Text) -> float | None:
    rows = text.rows.get(target)
    return None if rows is None else rows * text.row_nbytes


def _count(number: float | None) -> str:
    return MISSING if number is None else f"{number:,.0f}"


def _starts(records: list[PLEStartRecord]) -> list[Block]:
    """For each trace what a list of frequent ids saves, by residency and what it starts from."""
    found: list[Block] = []
    for trace in distinct(one.trace for one in records):
        ours = [one for one in records if one.trace == trace]
        found += [
            Heading(3, f"Starting from a list of frequent ids: {trace}"),
            Paragraph(
                f"Rows missed in the first {ours[0].tokens:,} tokens after a start, the mean of {ours[0].places} "
                "places in the second half, and hit rates of all of the second half after one start. The shipped list "
                "is made from the first halves of both real texts, so that on their second halves it knows the kind of "
                "text. The other text's list is made from that text's first half alone, and knows another kind."
            ),
        ]
        columns: list[Column[PLEStartRecord]] = [
            Column("residency", lambda one: one.residency, text=True),
            Column("starts from", _start, text=True),
        ]
        sizes = [(rows, f"{rows:,} rows, {megabytes(rows * ours[0].row_nbytes)} MB") for rows in ours[0].capacities]
        columns += [Column(f"missed, {size}", partial(ple.misses, rows=rows), significant) for rows, size in sizes]
        columns += [Column(f"hits, %, {size}", partial(_rate, rows), scaled(100)) for rows, size in sizes]
        found.append(table(columns, ours))
    return found


def _start(record: PLEStartRecord) -> str:
    return record.start if record.start == EMPTY_START else f"{record.start}, {record.list_rows:,} ids"


def _about(record: PLEHitsRecord, text: PLETextRecord | None) -> Paragraph:
    return Paragraph(
        (f"Token ids: {text.source}. " if text and text.source else "")
        + f"{record.tokens:,} tokens, {record.distinct:,} of them distinct; {record.row_nbytes:,} bytes a row. "
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


def _rate(rows: int, record: PLEHitsRecord | PLEStartRecord) -> float | None:
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
