"""Errors of weights by policy and class, and the speed of quantizing and decoding them."""

from __future__ import annotations

from collections.abc import Sequence

from epic_quant.records.subjects import GAUSSIAN, LadderRecord, SyntheticRecord, WeightsRecord
from epic_quant.report.formatting import quotient
from epic_quant.results.run import Run, distinct
from epic_quant.spec import BF16, WeightSpec

# The original's format, which synthetic weights are compared with.
ORIGINAL = WeightSpec("absmax4")


def series(spec: WeightSpec) -> str:
    """The family of a spec's format and its stages, without sizes: integer+had of int4-g128+had64."""
    stages = (("had", spec.hadamard_block), ("gptq", spec.gptq), ("imatrix", spec.imatrix), ("yaqa", spec.yaqa))
    return "+".join([spec.info.module, *(stage for stage, given in stages if given)])


def specs_text(specs: Sequence[WeightSpec]) -> str:
    """The specs of a class, which are several where its layers or kinds differ."""
    return ", ".join(map(str, specs))


def worst_classes(run: Run) -> list[WeightsRecord]:
    """For each policy the class with the largest error."""
    worst: dict[str, WeightsRecord] = {}
    for record in run.of(WeightsRecord):
        if record.rel_l2 is not None and record.rel_l2 > _error(worst.get(record.policy)):
            worst[record.policy] = record
    return list(worst.values())


def by_specs_and_class(run: Run) -> list[WeightsRecord]:
    """One record with an error for each class and its specs, whatever the policy."""
    records = [record for record in run.of(WeightsRecord) if record.rel_l2 is not None]
    return list({(record.specs, record.tensor_class): record for record in records}.values())


def worst_tensor(run: Run) -> tuple[str, WeightsRecord, float] | None:
    """The tensor with the largest error, its record and that error."""
    tensors = [
        (error, name, index)
        for index, record in enumerate(run.of(WeightsRecord))
        for name, error in record.tensors.items()
    ]
    if not tensors:
        return None
    error, name, index = max(tensors)
    return name, run.of(WeightsRecord)[index], error


def timed(run: Run, op: str) -> list[WeightsRecord]:
    """The records of an operation, one for each class and its specs, with the median over the policies that agree."""
    alike: dict[tuple[object, object], list[WeightsRecord]] = {}
    for record in run.of(WeightsRecord, op=op):
        alike.setdefault((record.specs, record.tensor_class), []).append(record)
    return [WeightsRecord.median(records) for records in alike.values()]


def speed_gbs(record: WeightsRecord | SyntheticRecord | None) -> float | None:
    """GB/s of the weights in bf16."""
    speed = quotient(record.bytes_read, record.time_s) if record else None
    return None if speed is None else speed / 1e9


def reference_gbs(records: Sequence[WeightsRecord]) -> dict[str, float | None]:
    """By class the speed of the bf16 copy, or where no copy was timed the slowest."""
    found: dict[str, float | None] = {}
    has_copy = any(record.specs == (BF16,) for record in records)
    for name in distinct(record.tensor_class for record in records):
        inside = [record for record in records if record.tensor_class == name]
        chosen = [record for record in inside if record.specs == (BF16,)] if has_copy else inside
        found[name] = min((speed for one in chosen if (speed := speed_gbs(one)) is not None), default=None)
    return found


def nearest_to_shannon(run: Run) -> list[LadderRecord]:
    """For each class the spec least above Shannon's bound."""
    best: dict[str, LadderRecord] = {}
    for record in run.of(LadderRecord):
        if record.shannon_gap_db is not None:
            known = best.get(record.tensor_class)
            if known is None or record.shannon_gap_db < (known.shannon_gap_db or 0.0):
                best[record.tensor_class] = record
    return list(best.values())


def e4b_seconds(record: SyntheticRecord) -> float | None:
    """Seconds for E4B's matrices, two bytes a weight, at the speed measured on the synthetic one."""
    return quotient(2e-9 * record.e4b_weights, speed_gbs(record))


def synthetic_specs(run: Run) -> list[SyntheticRecord]:
    """One record for each spec, that of the Gaussian where there is one, by bits."""
    records = {record.spec: record for record in run.of(SyntheticRecord)}
    records |= {record.spec: record for record in run.of(SyntheticRecord, distribution=GAUSSIAN)}
    return sorted(records.values(), key=lambda record: record.bits_per_weight or 0.0)


def _error(record: WeightsRecord | None) -> float:
    return -1.0 if record is None or record.rel_l2 is None else record.rel_l2
