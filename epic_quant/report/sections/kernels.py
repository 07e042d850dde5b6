"""Products with packed weights: time beside bf16's, and what part of the memory's speed they read at."""

from __future__ import annotations

from epic_quant.report.blocks import Block, Heading, Paragraph, Table, code
from epic_quant.report.formatting import MISSING, milliseconds, percent, quotient, significant, times
from epic_quant.results.run import Run

REFERENCE = "torch bf16"


def blocks(run: Run) -> list[Block]:
    """A table for each weight and number of tokens."""
    found: list[Block] = [
        Paragraph(
            "Seeded noise in the shapes of E4B's blocks, more of it than the caches hold. The error is the product's, "
            f"against the same stored weights in fp64. Times are medians, ratios are to `{REFERENCE}`; with more than "
            "one token a product computes more than it reads."
        )
    ]
    for weight in run.labels("kernels", "weight"):
        for tokens in run.labels("kernels", "tokens", weight=weight):
            found.append(Heading(3, f"{weight}, {tokens} {'token' if tokens == '1' else 'tokens'}"))
            found.append(_table(run, weight, tokens))
    return found


def findings(run: Run) -> list[str]:
    """The fastest packed product of each weight at one token."""
    found = []
    for weight in run.labels("kernels", "weight", tokens="1"):
        seconds = {
            how: value
            for how in run.labels("kernels", "how", weight=weight, tokens="1")
            if (value := run.value("kernels", "time_s", weight=weight, tokens="1", how=how)) is not None
        }
        reference = seconds.pop(REFERENCE, None)
        if seconds and reference:
            fastest = min(seconds, key=lambda how: seconds[how])
            ratio = significant(reference / seconds[fastest])
            found.append(
                f"One token by {code(weight)}: fastest is {code(fastest)}, {ratio} times as fast as `{REFERENCE}`."
            )
    return found


def _table(run: Run, weight: str, tokens: str) -> Table:
    labels = {"weight": weight, "tokens": tokens}
    reference = run.value("kernels", "time_s", how=REFERENCE, **labels)
    bandwidth = run.facts.get("read_bandwidth_gbs")
    columns = ["stored as, activations", "computed by", "error", "ms", f"of {REFERENCE}"]
    reads = tokens == "1"
    if reads:
        columns += ["GB/s", "of read bandwidth"]
    rows = []
    for how in run.labels("kernels", "how", **labels):
        computed_by = run.select("kernels", how=how, **labels)[0].details.get("computed_by")
        seconds = run.value("kernels", "time_s", how=how, **labels)
        row = [
            code(how),
            MISSING if computed_by is None else code(str(computed_by)),
            significant(run.value("kernels", "output_rel_l2", how=how, **labels), 2),
            milliseconds(seconds),
            times(seconds, reference),
        ]
        if reads:
            speed = quotient(run.value("kernels", "bytes_read", how=how, **labels), seconds)
            gbs = None if speed is None else speed / 1e9
            row += [significant(gbs), percent(gbs, bandwidth)]
        rows.append(tuple(row))
    return Table(tuple(columns), tuple(rows), num_text_columns=2)
