"""What each policy's formats do to the weights of every tensor class, and how fast they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import methodcaller
from typing import Any

from epic_quant.records.subjects import WeightsRecord
from epic_quant.report.analysis import weights
from epic_quant.report.analysis.policies import names
from epic_quant.report.blocks import Block, Heading, Paragraph, code
from epic_quant.report.columns import Column, table
from epic_quant.report.error_plot import error_over_bits
from epic_quant.report.formatting import MISSING, significant, times
from epic_quant.results.run import Run, distinct
from epic_quant.spec import BF16, WeightSpec


def blocks(run: Run) -> list[Block]:
    """Relative L2 and bits per weight by policy and class, the two drawn together, and speed by spec."""
    records = run.of(WeightsRecord)
    rows = run.facts.get("sampled_rows")
    taken = "all rows" if rows is None else f"a seeded sample of {rows} rows"
    points = [(one.tensor_class, one.specs[0], one) for one in records if len(one.specs) == 1]
    found: list[Block] = [
        Paragraph(
            f"Relative L2 error, ‖W - Ŵ‖ / ‖W‖ over {taken} of all tensors of a class together; storing zeros has "
            "an error of 1. — stands for a class that the policy does not quantize."
        ),
        _by_class(run, "rel_l2", 3),
        Paragraph("Bits per weight, with scales and all other metadata."),
        _by_class(run, "bits_per_weight", 4),
        *error_over_bits(points, "policies-error-against-bits.svg"),
    ]
    for op in distinct(record.op for record in records):
        found += [Heading(3, f"Speed of {op}"), *_speed(weights.timed(run, op))]
    return found


def findings(run: Run) -> list[str]:
    """The class with the largest error under each policy, what is worse than zeros, and the worst tensor."""
    called, found = names(run), []
    if worst := weights.worst_classes(run):
        each = (f"{code(called[one.policy])} {_of_class(one)}" for one in worst)
        found.append(f"Tensor class with the largest relative L2 under each policy: {', '.join(each)}.")
    pairs = weights.by_specs_and_class(run)
    useless = [one for one in pairs if (one.rel_l2 or 0.0) > 1]
    if useless:
        found.append(f"Worse than storing zeros (relative L2 above 1): {', '.join(map(_spec_on_class, useless))}.")
    elif pairs:
        largest = max(pairs, key=lambda one: one.rel_l2 or 0.0)
        found.append(
            "No policy stores a whole class worse than zeros would (a relative L2 of 1); the largest is "
            f"{_spec_on_class(largest)}."
        )
    if worst_tensor := weights.worst_tensor(run):
        name, record, error = worst_tensor
        spec = code(weights.specs_text(record.specs))
        found.append(f"Largest relative L2 of any one tensor: {code(name)} under {spec} ({significant(error)}).")
    return found


def _of_class(record: WeightsRecord) -> str:
    return f"{record.tensor_class} ({significant(record.rel_l2)})"


def _spec_on_class(record: WeightsRecord) -> str:
    return f"{code(weights.specs_text(record.specs))} on {_of_class(record)}"


_Cells = dict[str, Any]  # by class, and what the row is of under ""


def _by_class(run: Run, metric: str, digits: int) -> Block:
    rows: dict[str, _Cells] = {}
    called = names(run)
    for one in run.of(WeightsRecord):
        cells = rows.setdefault(one.policy, {"": called[one.policy]})
        cells[one.tensor_class] = getattr(one, metric)
    return _class_table("policy", rows.values(), lambda value: significant(value, digits))


def _class_table(of: str, rows: Iterable[_Cells], form: Callable[[Any], str]) -> Block:
    rows = list(rows)
    columns: list[Column[_Cells]] = [Column(of, lambda cells: cells[""], code, text=True)]
    classes = distinct(name for cells in rows for name in cells if name)
    columns += [Column(name, methodcaller("get", name), form) for name in classes]
    return table(columns, rows)


def _speed(records: Sequence[WeightsRecord]) -> list[Block]:
    """GB/s by spec and class, each beside its ratio to the bf16 copy, or to the slowest where no copy was timed."""
    references = weights.reference_gbs(records)
    rows: dict[tuple[WeightSpec, ...], _Cells] = {}
    for one in records:
        speed = weights.speed_gbs(one)
        text = f"{significant(speed)} ({times(speed, references[one.tensor_class])})"
        cells = rows.setdefault(one.specs, {"": weights.specs_text(one.specs)})
        cells[one.tensor_class] = MISSING if speed is None else text
    to = "the `bf16` copy" if (BF16,) in rows else "the slowest"
    return [
        Paragraph(f"GB/s of the weights in bf16, in brackets the ratio to {to} of the class; one tensor is timed."),
        _class_table("spec", rows.values(), lambda text: text or MISSING),
    ]
