"""A whole decoder block under each policy: the error of its output, and its time."""

from __future__ import annotations

from epic_quant.errors import ReportError
from epic_quant.report import plots
from epic_quant.report.blocks import Block, Figure, Heading, Paragraph, Table, code
from epic_quant.report.formatting import megabytes, milliseconds, percent, quotient, significant, times
from epic_quant.report.pareto import Sized, front
from epic_quant.report.sections.footprint import resident_nbytes
from epic_quant.results.run import Run

REFERENCE = "bf16"


def blocks(run: Run) -> list[Block]:
    """The plot of a token's time, then a table for each layer type and number of tokens."""
    found: list[Block] = [
        Paragraph(
            "Error of a block's output on real hidden states: relative to what the block adds to the stream, and to "
            f"the whole output. Times are medians, and ratios are to `{REFERENCE}` of the same layer type and tokens."
        ),
        *_figure(run),
    ]
    for layer_type in run.labels("block", "layer_type"):
        for tokens in sorted(run.labels("block", "tokens", layer_type=layer_type), key=_number):
            title = f"{layer_type}, {tokens} {'token' if tokens == '1' else 'tokens'}"
            found += [Heading(3, title), _table(run, layer_type, tokens)]
    return found


def findings(run: Run) -> list[str]:
    """The least error within each size, and the fastest and slowest policies at one token."""
    found = []
    if frontier := front(sized(run)):
        steps = ", ".join(
            f"{code(policy)} ({megabytes(nbytes)} MB, {significant(error)})" for policy, nbytes, error in frontier
        )
        found.append(
            "Least error within each size, by resident bytes and the largest error of a block relative to what it "
            f"adds: {steps}."
        )
    for layer_type in run.labels("block", "layer_type", tokens="1"):
        labels = {"layer_type": layer_type, "tokens": "1"}
        reference = run.value("block", "time_s", policy=REFERENCE, **labels)
        ratios = {
            policy: ratio
            for policy in run.labels("block", "policy", **labels)
            if policy != REFERENCE
            and (ratio := quotient(run.value("block", "time_s", policy=policy, **labels), reference)) is not None
        }
        if ratios:
            fastest, slowest = min(ratios, key=lambda key: ratios[key]), max(ratios, key=lambda key: ratios[key])
            found.append(
                f"Time of a {layer_type} block for one token, in times of `{REFERENCE}`: fastest {code(fastest)} "
                f"({significant(ratios[fastest])}×), slowest {code(slowest)} ({significant(ratios[slowest])}×)."
            )
    return found


def sized(run: Run) -> list[Sized]:
    """Policy, resident bytes and the largest error of a block relative to what it adds, where both are known."""
    sizes = resident_nbytes(run, "this checkpoint")
    found = []
    for policy in run.labels("block", "policy"):
        errors = [record.metrics.get("added_rel_l2") for record in run.select("block", policy=policy)]
        present = [error for error in errors if error is not None]
        if present and policy in sizes:
            found.append((policy, sizes[policy], max(present)))
    return found


def _figure(run: Run) -> list[Block]:
    points = []
    for record in run.select("block", tokens="1"):
        nbytes, seconds = record.metrics.get("nbytes"), record.metrics.get("time_s")
        if plots.drawable(nbytes) and plots.drawable(seconds):
            labels = record.labels
            points.append(plots.Point(labels["layer_type"], labels["policy"], nbytes / 1e6, seconds * 1e3))
    if not points:
        return []
    panels = ", ".join(dict.fromkeys(point.panel for point in points))
    alt = (
        f"Time of a block for one token over the bytes of its weights, both logarithmic, a panel for each of {panels}, "
        "a colour and a marker for each policy"
    )
    measured = run.facts.get("read_bandwidth_gbs")
    bandwidth = measured if plots.drawable(measured) else None
    if bandwidth:
        alt += ", with the time that reading the weights once takes"
    alt += "; " + plots.extremes(points, lambda point: f"{point.series} on {point.panel}", "ms")
    return [Figure("block-time-against-bytes.svg", alt, plots.time_over_bytes(points, bandwidth))]


def _table(run: Run, layer_type: str, tokens: str) -> Table:
    labels = {"layer_type": layer_type, "tokens": tokens}
    reference = run.value("block", "time_s", policy=REFERENCE, **labels)
    bandwidth = run.facts.get("read_bandwidth_gbs")
    columns = ["policy", "error of what is added", "error of the output", "ms", f"of {REFERENCE}", "weights, MB"]
    # With more tokens a block computes more than it reads, so bytes a second say little.
    reads = tokens == "1"
    if reads:
        columns += ["GB/s", "of read bandwidth"]
    rows = []
    for policy in run.labels("block", "policy", **labels):
        metrics = {
            name: run.value("block", name, policy=policy, **labels)
            for name in ("added_rel_l2", "output_rel_l2", "time_s", "nbytes")
        }
        row = [
            code(policy),
            significant(metrics["added_rel_l2"]),
            significant(metrics["output_rel_l2"]),
            milliseconds(metrics["time_s"]),
            times(metrics["time_s"], reference),
            megabytes(metrics["nbytes"]),
        ]
        if reads:
            speed = quotient(metrics["nbytes"], metrics["time_s"])
            gbs = None if speed is None else speed / 1e9
            row += [significant(gbs), percent(gbs, bandwidth)]
        rows.append(tuple(row))
    return Table(tuple(columns), tuple(rows))


def _number(tokens: str) -> int:
    if not tokens.isdecimal():
        raise ReportError(f"a 'block' record has tokens {tokens!r}, expected a number")
    return int(tokens)
