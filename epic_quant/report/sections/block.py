"""A whole decoder block under each policy: the error of its output, and its time."""

from __future__ import annotations

from epic_quant.records.subjects import BlockRecord
from epic_quant.report import plots
from epic_quant.report.analysis import policies, speed
from epic_quant.report.blocks import Block, Heading, Paragraph, Table, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import megabytes, milliseconds, percent, ratio, significant, times
from epic_quant.report.wording import front_steps
from epic_quant.results.run import Run, distinct
from epic_quant.spec import REFERENCE


def blocks(run: Run) -> list[Block]:
    """The plot of a token's time, then a table for each layer type and number of tokens."""
    found: list[Block] = [
        Paragraph(
            "Error of a block's output on real hidden states, relative to what the block adds to the residual stream "
            f"and to the whole output. Times are medians, ratios to `{REFERENCE}` of the same layer type and tokens."
        ),
        *_figure(run),
    ]
    for layer_type in distinct(one.layer_type for one in run.of(BlockRecord)):
        for tokens in sorted({one.tokens for one in run.of(BlockRecord, layer_type=layer_type)}):
            title = f"{layer_type}, {tokens} {'token' if tokens == 1 else 'tokens'}"
            found += [Heading(3, title), _table(run, layer_type, tokens)]
    return found


def findings(run: Run) -> list[str]:
    """The least error within each size, and the fastest and slowest policies at one token."""
    found, called = [], policies.names(run)
    if front := policies.pareto_front(policies.by_block_error(run)):
        found.append(
            "Least error within each size, by resident bytes and the largest error of a block relative to what it "
            f"adds: {front_steps(front, called)}."
        )
    for one in speed.blocks(run):
        (fastest, least), (slowest, most) = one.fastest, one.slowest
        found.append(
            f"Time of a {one.of} block for one token, relative to `{REFERENCE}`: fastest "
            f"{code(called[fastest])} ({ratio(least)}), slowest {code(called[slowest])} "
            f"({ratio(most)})."
        )
    return found


def _figure(run: Run) -> list[Block]:
    called = policies.names(run)
    points = [
        plots.Point(one.layer_type, called[one.policy], one.nbytes / 1e6, one.time_s * 1e3)
        for one in run.of(BlockRecord, tokens=1)
        if one.nbytes is not None and one.time_s is not None
    ]
    bandwidth, lines = run.facts.get("read_bandwidth_gbs"), []
    if points and plots.drawable(bandwidth):
        # MB over GB/s is ms.
        name = f"reading the weights\nonce, at {significant(bandwidth)} GB/s"
        lines = [plots.Line(name, [(size, size / bandwidth) for size in plots.padded(point.x for point in points)])]
    plot = plots.Scatter(
        x=plots.Axis("MB of the block's weights", lambda value: f"{significant(value)} MB"),
        y=plots.Axis("time for one token, ms", lambda value: f"{significant(value)} ms"),
        points=points,
        lines=lines,
        size=(4.6, 4.2),
    )
    return plots.scatter("block-time-against-bytes.svg", plot)


def _table(run: Run, layer_type: str, tokens: int) -> Table:
    records = run.of(BlockRecord, layer_type=layer_type, tokens=tokens)
    reference = next((one.time_s for one in records if one.policy == REFERENCE), None)
    bandwidth, called = run.facts.get("read_bandwidth_gbs"), policies.names(run)
    columns: list[Column[BlockRecord]] = [
        Column("policy", lambda one: called[one.policy], code, text=True),
        Column("error of what is added", lambda one: one.added_rel_l2, significant),
        Column("error of the output", lambda one: one.output_rel_l2, significant),
        Column("ms", lambda one: one.time_s, milliseconds),
        Column(f"of {REFERENCE}", lambda one: times(one.time_s, reference)),
        Column("weights, MB", lambda one: one.nbytes, megabytes),
    ]
    # With more tokens a block computes more than it reads, so bytes a second say little.
    if tokens == 1:
        columns += [
            Column("GB/s", lambda one: speed.gbs(one.nbytes, one.time_s), significant),
            Column("of read bandwidth", lambda one: percent(speed.gbs(one.nbytes, one.time_s), bandwidth)),
        ]
    return table(columns, records)
