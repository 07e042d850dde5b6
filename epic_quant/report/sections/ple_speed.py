"""PLE lookups of resident rows and of rows on the disk, and the memory of a full cache."""

from __future__ import annotations

from functools import partial

from epic_quant.records.subjects import PLEColdRecord, PLEHotRecord, PLEMemoryRecord
from epic_quant.report.analysis import ple
from epic_quant.report.blocks import Block, Heading, Paragraph
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import MISSING, megabytes, quotient, scaled, significant, times
from epic_quant.results.run import Run, distinct

_COLD: tuple[Column[PLEColdRecord], ...] = (
    Column("rows on disk", lambda one: f"{one.way}, {one.batch} a call, {one.threads} threads", text=True),
    Column("p50, µs", lambda one: one.p50_s, scaled(1e6)),
    Column("p99, µs", lambda one: one.p99_s, scaled(1e6)),
    Column("µs a token", ple.cold_s, scaled(1e6)),
    Column("MB asked", lambda one: one.bytes_read, megabytes),
    Column("MB fetched", lambda one: one.fetched_nbytes, megabytes),
)
_MEMORY: tuple[Column[PLEMemoryRecord], ...] = (
    Column("in memory", lambda one: "full cache", text=True),
    Column("resident rows, MB", lambda one: one.nbytes, megabytes),
    Column("added to the process, as the system reports, MB", lambda one: one.anonymous_nbytes, megabytes),
    Column("ratio", lambda one: times(one.anonymous_nbytes, one.nbytes)),
)


def blocks(run: Run) -> list[Block]:
    """Tables of lookups of resident rows, of rows on the disk, and of memory, by the table that is looked up in."""
    found: list[Block] = [
        Paragraph(
            "Synthetic tables have E4B's row width and random bytes. Rows on the disk are in no cache of this program "
            "and not in the system's page cache, which is checked; — stands where it cannot be."
        )
    ]
    hot: tuple[Column[PLEHotRecord], ...] = (
        Column("all resident, tokens a call", lambda one: f"{one.way}, {one.batch} a call", text=True),
        Column("µs a token", lambda one: quotient(one.time_s, one.tokens), scaled(1e6)),
        Column("layer lookups a second", lambda one: ple.layer_lookups([one]), lambda rate: significant(rate, 2)),
        Column("of index_select's time", partial(_of_dense, run)),
    )
    for name in _tables(run):
        found.append(Heading(3, name))
        if records := run.of(PLEHotRecord, table=name):
            found.append(table(hot, records))
        if cold := run.of(PLEColdRecord, table=name):
            found.append(table(_COLD, cold))
        if memory := run.of(PLEMemoryRecord, table=name):
            found.append(table(_MEMORY, memory))
    return found


def findings(run: Run) -> list[str]:
    """How the cache compares with a dense table and the original's way, and rows read together with one by one."""
    found = []
    for name in _tables(run):
        clauses = [
            f"{significant(one.throughput_to_dense)} of `index_select`'s throughput at {one.batch}"
            for one in run.of(PLEHotRecord, table=name, way="cache")
            if one.throughput_to_dense is not None
        ]
        cache, original = (
            ple.layer_lookups(run.of(PLEHotRecord, table=name, way=way)) for way in ("cache", "the original's")
        )
        if (faster := times(cache, original)) != MISSING:
            clauses.append(f"{faster} the layer lookups a second of the original's way")
        one, many = (
            ple.cold_s(run.one(PLEColdRecord, table=name, way="positioned", threads=1, batch=batch))
            for batch in (1, 64)
        )
        if (faster := times(one, many)) != MISSING:
            clauses.append(f"64 rows on disk in one call {faster} as fast as one by one")
        if clauses:
            found.append(f"PLE lookups, {name}: {'; '.join(clauses)}.")
    return found


def _tables(run: Run) -> list[str]:
    tables = [record.table for record in run.of(PLEHotRecord)]
    tables += [record.table for record in run.of(PLEColdRecord)]
    return distinct([*tables, *(record.table for record in run.of(PLEMemoryRecord))])


def _of_dense(run: Run, record: PLEHotRecord) -> str:
    labels = {"table": record.table, "batch": record.batch}
    return times(record.time_s, run.value(PLEHotRecord, "time_s", way="index_select", **labels))
