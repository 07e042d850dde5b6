"""The PLE row cache: hits over resident MB, lookups hot and cold, and what few bits do to the table and projections."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

from epic_quant.errors import ReportError
from epic_quant.records import Record
from epic_quant.report import plots
from epic_quant.report.blocks import Block, Figure, Heading, Paragraph, Table, code
from epic_quant.report.formatting import MISSING, megabytes, quotient, significant, times
from epic_quant.results.run import Run

OPTIMUM = "optimum"
LOWEST_IDS = "static, lowest ids"
_TARGETS = (0.90, 0.95, 0.99)
_GUARDED_BITS = 8.0


def hits_blocks(run: Run) -> list[Block]:
    """The plot, then for each trace hit rates by policy and capacity and the MB that reach the targets."""
    found: list[Block] = [
        Paragraph(
            "Share of token lookups that are answered from RAM. The first half of each trace warms the caches and is "
            "what the most frequent rows are chosen by; the second half is judged. The optimum is Belady's, with any "
            "rows hot at the beginning: no policy can be above it, and no policy that does not know the future can "
            "reach it."
        ),
        *_hits_figure(run),
    ]
    for trace in run.labels("ple_hits", "trace"):
        records = run.select("ple_hits", trace=trace)
        found += [Heading(3, trace), _trace_facts(records[0]), _hit_rates(records)]
    return found


def hits_findings(run: Run) -> list[str]:
    """For each trace who needs the least MB for each target, and what the lowest ids give."""
    found = []
    for trace in run.labels("ple_hits", "trace"):
        records = run.select("ple_hits", trace=trace)
        reached = []
        for target in _TARGETS:
            rows = {record.labels["residency"]: _rows_for(record, target) for record in records}
            enough = {name: number for name, number in rows.items() if number is not None and name != OPTIMUM}
            if enough:
                best = min(enough, key=lambda name: enough[name])
                (record,) = (record for record in records if record.labels["residency"] == best)
                ratio = times(enough[best], rows.get(OPTIMUM))
                beside = "" if ratio == MISSING else f", {ratio} the optimum's"
                reached.append(f"{target:.0%} with {_size(record, target)} MB ({best}{beside})")
        lowest = run.value("ple_hits", "hit_rate", trace=trace, residency=LOWEST_IDS)
        parts = [
            f"PLE hits on {trace}: {'; '.join(reached) if reached else 'no policy reaches 90% at the sizes tried'}"
        ]
        if lowest is not None:
            parts.append(f"as many of the lowest ids as the original kept give {significant(100 * lowest)}%")
        found.append("; ".join(parts) + ".")
    return found


def rows_findings(run: Run) -> list[str]:
    """Rows and MB for each target on the last trace: the user's own, or the evaluation text."""
    trace = run.labels("ple_hits", "trace")[-1]
    reached = []
    for target in _TARGETS:
        enough = [
            (rows, record)
            for record in run.select("ple_hits", trace=trace)
            if record.labels["residency"] != OPTIMUM and (rows := _rows_for(record, target)) is not None
        ]
        if enough:
            rows, record = min(enough, key=lambda pair: pair[0])
            said = f"{_size(record, target)} MB, {record.labels['residency']}"
            reached.append(f"{target:.0%} {math.ceil(rows):,} rows ({said})")
    return [f"Resident PLE rows that answer so many lookups of {trace}: {', '.join(reached)}."] if reached else []


def speed_blocks(run: Run) -> list[Block]:
    """Tables of hot lookups, cold lookups and memory, by the table that was looked up in."""
    found: list[Block] = [
        Paragraph(
            "Synthetic tables have E4B's row width and random bytes. Cold rows are in no cache of this program and in "
            "none of the system's, which is looked up; where it does not tell, — stands."
        )
    ]
    for table in run.labels("ple_speed", "table"):
        found.append(Heading(3, table))
        for heat, made in (("hot", _hot), ("cold", _cold), ("resident", _resident)):
            records = run.select("ple_speed", table=table, heat=heat)
            if records:
                found.append(made(run, table, records))
    return found


def speed_findings(run: Run) -> list[str]:
    """How the cache compares with a dense table, with the original's way, and cold rows at once with one by one."""
    found = []
    for table in run.labels("ple_speed", "table"):
        ratios = [
            f"{significant(ratio)} of `index_select`'s throughput at {record.labels['batch']}"
            for record in run.select("ple_speed", table=table, heat="hot", way="cache")
            if (ratio := _detail(record, "throughput_to_dense")) is not None
        ]
        cache, original = (
            _layer_lookups(run.select("ple_speed", table=table, heat="hot", way=way))
            for way in ("cache", "the original's")
        )
        if (faster := times(cache, original)) != MISSING:
            ratios.append(f"{faster} the layer lookups a second of the original's way")
        labels = {"table": table, "heat": "cold", "way": "positioned", "threads": "1"}
        one, many = (_cold_s(run.select("ple_speed", batch=batch, **labels)) for batch in ("1", "64"))
        if (faster := times(one, many)) != MISSING:
            ratios.append(f"cold rows 64 at once {faster} as fast as one by one")
        if ratios:
            found.append(f"PLE lookups, {table}: {'; '.join(ratios)}.")
    return found


def guard_blocks(run: Run) -> list[Block]:
    """The effect of every spec, and the policies that go below eight bits."""
    rows = []
    for record in run.select("ple_guard"):
        labels, metrics = record.labels, record.metrics
        values = (significant(metrics.get(name)) for name in ("bits_per_weight", "rel_l2", "kl_divergence"))
        rows.append((f"{labels['tensor_class']} {code(labels['spec'])}", *values))
    columns = ("one class alone", "bits per weight", "relative L2", "KL divergence, nats a token")
    found: list[Block] = [
        Paragraph(
            "One class quantized and all else left as it is, against `bf16` on a short window of the evaluation text. "
            "Others report quality collapsing below 8 bits here."
        ),
        Table(columns, tuple(rows)),
    ]
    if marked := _marked(run):
        found.append(Paragraph("Policies of this run that put these below 8 bits, and what that alone does:"))
        found.append(Table(("policy", "KL divergence, nats a token"), tuple(marked)))
    else:
        found.append(Paragraph("No policy of this run puts the PLE table or the PLE projections below 8 bits."))
    return found


def guard_findings(run: Run) -> list[str]:
    """The policies that go below eight bits, with the effect that was measured."""
    marked = "; ".join(f"{policy}: {effect}" for policy, effect in _marked(run))
    return [f"Below 8 bits in the PLE table or projections, KL divergence in nats: {marked}."] if marked else []


def _curve(record: Record) -> list[tuple[int, float]]:
    """Rows and hit rate, ascending in rows; empty where they are missing. Raises ReportError where they are damaged."""
    rows, rates = (record.details.get(name, []) for name in ("capacities", "hit_rates"))
    if not _is_numbers(rows) or not _is_numbers(rates) or len(rows) != len(rates):
        raise ReportError(f"a 'ple_hits' record holds no hit rate for each capacity: {dict(record.labels)}")
    return sorted(zip(rows, rates, strict=True))


def _detail(record: Record, name: str) -> float | None:
    value = record.details.get(name)
    return value if isinstance(value, int | float) else None


def _nbytes(record: Record, rows: float) -> float | None:
    return _in(rows, _detail(record, "row_nbytes"))


def _rows_for(record: Record, target: float) -> float | None:
    """Rows that reach a hit rate, between two measured numbers on the straight line over the logarithm of rows."""
    curve = _curve(record)
    if curve and curve[0][1] >= target:
        return curve[0][0]
    for (low, low_rate), (high, high_rate) in pairwise(curve):
        if low_rate < target <= high_rate:
            share = (target - low_rate) / (high_rate - low_rate)
            return float(low * (high / low) ** share)
    return None


def _size(record: Record, target: float) -> str:
    """MB that reach a hit rate; with a sign where they are the fewest that were tried, so that fewer may do."""
    rows = _rows_for(record, target)
    if rows is None:
        return MISSING
    return ("≤ " if rows <= _curve(record)[0][0] else "") + megabytes(_nbytes(record, rows))


def _hits_figure(run: Run) -> list[Block]:
    points, marks = [], []
    for record in run.select("ple_hits"):
        labels = record.labels
        row_nbytes, original_rows = _detail(record, "row_nbytes"), _detail(record, "original_rows")
        if not row_nbytes:
            continue
        for rows, rate in _curve(record):
            points.append(plots.Point(labels["trace"], labels["residency"], rows * row_nbytes / 1e6, rate))
        rate_there = record.metrics.get("hit_rate")
        if labels["residency"] == LOWEST_IDS and rate_there is not None and original_rows:
            there = original_rows * row_nbytes / 1e6
            marks.append(plots.Point(labels["trace"], "the original's point", there, rate_there))
    if not points:
        return []
    panels = ", ".join(dict.fromkeys(point.panel for point in points))
    alt = (
        f"Hit rate over resident MB, logarithmic, a panel for each of {panels}, a line for each policy and the "
        "optimum, with the original's point marked; "
        + plots.extremes([point for point in points if point.series != OPTIMUM], _told)
    )
    return [Figure("ple-hits-over-bytes.svg", alt, plots.hits_over_bytes(points, marks, OPTIMUM))]


def _told(point: plots.Point) -> str:
    return f"{point.series} with {significant(point.x)} MB on {point.panel}"


def _trace_facts(record: Record) -> Paragraph:
    tokens, distinct, row_nbytes = (
        MISSING if value is None else f"{value:,}"
        for value in (_detail(record, name) for name in ("tokens", "distinct", "row_nbytes"))
    )
    return Paragraph(
        f"{tokens} tokens judged, {distinct} of them distinct; {row_nbytes} bytes a row. "
        f"{significant(_in(100, _detail(record, 'met_before')))}% had come before, which is the most for a cache that "
        "must meet a token before it holds the row."
    )


def _hit_rates(records: list[Record]) -> Table:
    """A row for each policy: hit rates by capacity, then the MB that reach the targets."""
    capacities = [rows for rows, _ in _curve(records[0])]
    columns = [f"{rows:,} rows, {megabytes(_nbytes(records[0], rows))} MB" for rows in capacities]
    columns += [f"MB for {target:.0%}" for target in _TARGETS]
    table = []
    for record in records:
        rates = dict(_curve(record))
        cells = [significant(_in(100, rates.get(rows))) for rows in capacities]
        table.append((record.labels["residency"], *cells, *(_size(record, target) for target in _TARGETS)))
    return Table(("hit rate, %", *columns), tuple(table))


def _hot(run: Run, table: str, records: list[Record]) -> Table:
    rows = []
    for record in records:
        labels, seconds, tokens = record.labels, record.metrics.get("time_s"), _detail(record, "tokens")
        dense = run.value("ple_speed", "time_s", table=table, heat="hot", way="index_select", batch=labels["batch"])
        rows.append(
            (
                f"{labels['way']}, {labels['batch']} a call",
                significant(_in(1e6, quotient(seconds, tokens))),
                significant(_layer_lookups([record]), 2),
                times(seconds, dense),
            )
        )
    return Table(
        ("all hot, tokens a call", "µs a token", "layer lookups a second", "of index_select's time"), tuple(rows)
    )


def _cold(run: Run, table: str, records: list[Record]) -> Table:
    rows = []
    for record in records:
        labels, metrics = record.labels, record.metrics
        rows.append(
            (
                f"{labels['way']}, {labels['batch']} a call, {labels['threads']} calling",
                *(significant(_in(1e6, metrics.get(name))) for name in ("p50_s", "p99_s")),
                significant(_in(1e6, _cold_s([record]))),
                megabytes(metrics.get("bytes_read")),
                megabytes(metrics.get("fetched_nbytes")),
            )
        )
    columns = ("all cold, rows a call", "p50, µs", "p99, µs", "µs a token", "MB asked", "MB fetched")
    return Table(columns, tuple(rows))


def _resident(run: Run, table: str, records: list[Record]) -> Table:
    rows = tuple(
        (
            "full cache",
            megabytes(record.metrics.get("nbytes")),
            megabytes(record.metrics.get("anonymous_nbytes")),
            times(record.metrics.get("anonymous_nbytes"), record.metrics.get("nbytes")),
        )
        for record in records
    )
    return Table(("in memory", "hot rows, MB", "added to the process, as the system tells, MB", "ratio"), rows)


def _layer_lookups(records: list[Record]) -> float | None:
    """Layer lookups a second, the most of all batches."""
    rates = []
    for record in records:
        a_token = quotient(record.metrics.get("time_s"), _detail(record, "tokens"))
        if (rate := quotient(_detail(record, "layers"), a_token)) is not None:
            rates.append(rate)
    return max(rates, default=None)


def _cold_s(records: list[Record]) -> float | None:
    """Seconds a token of a verified cold pass."""
    seconds = [quotient(_detail(record, "pass_s"), _detail(record, "tokens")) for record in records]
    return next((value for value in seconds if value is not None), None)


def _marked(run: Run) -> list[tuple[str, str]]:
    """Policy with the class and spec that are below eight bits, and the KL divergence of that alone."""
    found = []
    for policy, text in (run.facts.get("policy_strings") or {}).items():
        for tensor_class, spec in re.findall(r"(ple_table|ple_projections)=([^,]+)", str(text)):
            labels = {"tensor_class": tensor_class, "spec": spec}
            bits = run.value("ple_guard", "bits_per_weight", **labels)
            if bits is not None and bits < _GUARDED_BITS:
                effect = significant(run.value("ple_guard", "kl_divergence", **labels))
                found.append((f"{code(policy)}, {tensor_class} {code(spec)}", effect))
    return found


def _in(factor: float, value: float | None) -> float | None:
    return None if value is None else value * factor


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < math.inf for number in value
    )
