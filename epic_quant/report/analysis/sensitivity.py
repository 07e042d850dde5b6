"""Which tensor class costs most divergence for the bytes that it saves."""

from __future__ import annotations

from dataclasses import dataclass

from epic_quant.records.subjects import CALIBRATION, EVALUATION, SensitivityRecord
from epic_quant.results.run import Run, distinct
from epic_quant.spec import WeightSpec


@dataclass(frozen=True)
class Costs:
    """The costliest and cheapest class and spec, in nats a MB saved, and the costliest class at each width."""

    costliest: SensitivityRecord
    cheapest: SensitivityRecord
    by_width: tuple[tuple[str, str], ...]


def reported(run: Run) -> list[SensitivityRecord]:
    """Those on the evaluation text; on the calibration text where that was not run."""
    return run.of(SensitivityRecord, text=EVALUATION) or run.of(SensitivityRecord, text=CALIBRATION)


def width(record: SensitivityRecord) -> str:
    """A spec without its group, which is smaller for classes of short rows: what classes are compared at."""
    storage = record.storage
    return str(storage.without_group) if isinstance(storage, WeightSpec) else record.spec


def costs(run: Run) -> Costs | None:
    """Over classes as a whole; None where none has a cost."""
    records = [one for one in reported(run) if one.layer is None and one.kl_per_mb is not None]
    if not records:
        return None

    def cost(record: SensitivityRecord) -> float:
        return record.kl_per_mb or 0.0

    by_width = []
    for name in distinct(map(width, records)):
        inside = [one for one in records if width(one) == name]
        if len({one.tensor_class for one in inside}) > 1:
            by_width.append((name, max(inside, key=cost).tensor_class))
    return Costs(max(records, key=cost), min(records, key=cost), tuple(by_width))
