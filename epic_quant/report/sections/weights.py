"""What each policy's schemes do to the weights of every tensor class, and how fast they are."""

from __future__ import annotations

import re
from collections.abc import Iterable

from epic_quant.records import Record
from epic_quant.report import plots
from epic_quant.report.blocks import Block, Figure, Heading, Paragraph, Table, code
from epic_quant.report.formatting import MISSING, quotient, significant, times
from epic_quant.results.run import Run

# Beyond, errors are too small to tell schemes apart, and the axis would be mostly empty.
_MAX_DRAWN_BITS = 6.0


def blocks(run: Run) -> list[Block]:
    """Relative L2 and bits per weight by policy and class, the two drawn together, and speed by scheme."""
    rows = run.facts.get("sampled_rows")
    taken = "all rows" if rows is None else f"a seeded sample of {rows} rows"
    found: list[Block] = [
        Paragraph(
            f"Relative L2 error, ‖W - Ŵ‖ / ‖W‖ over {taken} of all tensors of a class together; 1 is the error of "
            "storing zeros. A class that a policy does not quantize has —."
        ),
        _by_class(run, "rel_l2", digits=3),
        Paragraph("Bits per weight, scales and all other metadata included."),
        _by_class(run, "bits_per_weight", digits=4),
        *error_figure(run.select("weights"), "policies-error-against-bits.svg"),
    ]
    for op in run.labels("weights", "op"):
        found += [Heading(3, f"Speed of {op}"), *_speed(run, op)]
    return found


def findings(run: Run) -> list[str]:
    """The class that suffers most under each policy, schemes that are worse than zeros, and the worst tensor."""
    found = []
    worst = []
    for policy in run.labels("weights", "policy"):
        errors = _errors(run, "tensor_class", policy=policy)
        if errors:
            tensor_class = max(errors, key=lambda name: errors[name])
            worst.append(f"{code(policy)} {tensor_class} ({significant(errors[tensor_class])})")
    if worst:
        found.append(f"Tensor class with the largest relative L2 under each policy: {', '.join(worst)}.")
    pairs = {
        (spec, tensor_class): error
        for spec in run.labels("weights", "spec")
        for tensor_class, error in _errors(run, "tensor_class", spec=spec).items()
    }
    useless = [f"{code(spec)} on {name} ({significant(error)})" for (spec, name), error in pairs.items() if error > 1]
    if useless:
        found.append(f"Relative L2 above 1, so worse than storing zeros: {', '.join(useless)}.")
    elif pairs:
        spec, name = max(pairs, key=lambda pair: pairs[pair])
        largest = f"{code(spec)} on {name} ({significant(pairs[spec, name])})"
        found.append(
            f"Under no policy is a whole class worse than storing zeros, a relative L2 of 1; the largest is {largest}."
        )
    tensors = [
        (error, name, record.labels["spec"])
        for record in run.select("weights")
        for name, error in record.details.get("tensors", {}).items()
        if error is not None
    ]
    if tensors:
        error, name, spec = max(tensors)
        found.append(f"Largest relative L2 of any one tensor: {code(name)} under {code(spec)} ({significant(error)}).")
    return found


def error_figure(records: Iterable[Record], file_name: str) -> list[Block]:
    """Error over bits of records that bear a class and a spec, and what is not drawn; nothing where no point is."""
    points = {}
    for record in records:
        bits, error = record.metrics.get("bits_per_weight"), record.metrics.get("rel_l2")
        if plots.drawable(bits) and plots.drawable(error) and bits <= _MAX_DRAWN_BITS:
            tensor_class, spec = record.labels["tensor_class"], record.labels["spec"]
            points[tensor_class, spec] = plots.Point(tensor_class, scheme(spec), bits, error, spec)
    if not points:
        return []
    classes = ", ".join(dict.fromkeys(tensor_class for tensor_class, _ in points))
    alt = (
        f"Relative L2 error on a logarithmic scale over bits per weight, a panel for each of {classes}, a colour for "
        "each scheme, with Shannon's bound and Lloyd-Max quantizers of a Gaussian source; "
        + plots.extremes(list(points.values()), lambda point: f"{point.name} on {point.panel}")
    )
    return [
        Figure(file_name, alt, plots.error_over_bits(list(points.values()))),
        Paragraph(
            "Shannon's bound and Lloyd-Max are those of a Gaussian source. Weights that vary in scale from group to "
            "group can lie below either. Exact copies and anything over "
            f"{significant(_MAX_DRAWN_BITS, 1)} bits are not drawn."
        ),
    ]


def scheme(spec: str) -> str:
    """A spec without its width, group and other sizes: the series that it belongs to, int+had of int4-g128+had64."""
    return re.sub(r"-g\d+|\d+", "", spec)


def _errors(run: Run, label: str, /, **labels: str) -> dict[str, float]:
    values = {
        name: run.value("weights", "rel_l2", **labels, **{label: name})
        for name in run.labels("weights", label, **labels)
    }
    return {name: value for name, value in values.items() if value is not None}


def _by_class(run: Run, metric: str, digits: int) -> Table:
    classes = run.labels("weights", "tensor_class")
    rows = (
        (
            code(policy),
            *(significant(run.value("weights", metric, policy=policy, tensor_class=name), digits) for name in classes),
        )
        for policy in run.labels("weights", "policy")
    )
    return Table(("policy", *classes), tuple(rows))


def _speed(run: Run, op: str) -> list[Block]:
    """GB/s by scheme and class, each beside its ratio to the copy, or to the slowest where no copy was timed."""
    classes = run.labels("weights", "tensor_class", op=op)
    specs = run.labels("weights", "spec", op=op)
    speeds = {(spec, name): _gbs(run, spec, name, op) for spec in specs for name in classes}
    references = {}
    for name in classes:
        present = [speed for spec in specs if (speed := speeds[spec, name]) is not None]
        references[name] = speeds["bf16", name] if "bf16" in specs else min(present, default=None)
    to = "the `bf16` copy" if "bf16" in specs else "the slowest"
    rows = tuple(
        (code(spec), *(_speed_cell(speeds[spec, name], references[name]) for name in classes)) for spec in specs
    )
    return [
        Paragraph(f"GB/s of the weights in bf16, in brackets the ratio to {to} of the class; one tensor is timed."),
        Table(("spec", *classes), rows),
    ]


def _gbs(run: Run, spec: str, tensor_class: str, op: str) -> float | None:
    labels = {"spec": spec, "tensor_class": tensor_class, "op": op}
    speed = quotient(run.value("weights", "bytes_read", **labels), run.value("weights", "time_s", **labels))
    return None if speed is None else speed / 1e9


def _speed_cell(speed: float | None, reference: float | None) -> str:
    return MISSING if speed is None else f"{significant(speed)} ({times(speed, reference)})"
