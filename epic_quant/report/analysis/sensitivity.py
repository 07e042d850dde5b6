"""Which tensor class costs most divergence for the bytes that it saves."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from epic_quant.records.subjects import CALIBRATION, EVALUATION, SensitivityRecord
from epic_quant.report.analysis import policies
from epic_quant.report.formatting import quotient
from epic_quant.results.run import Run, distinct
from epic_quant.spec import FORMATS, KV_CACHE, TensorClass, WeightSpec


@dataclass(frozen=True)
class Costs:
    """The costliest and cheapest class and spec, in nats a MB saved, and the costliest class at each width."""

    costliest: SensitivityRecord
    cheapest: SensitivityRecord
    by_width: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class AtWidth:
    """The least divergence of one class alone at a number of bits, `of_noise` times that of computing in bf16.

    `of_others` is how many times as much a MB saved a class of tensors costs as the median of the others does under the
    same spec, groups aside; None where there are none.
    """

    bits: int
    record: SensitivityRecord
    of_noise: float
    of_others: float | None


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


# What people ask about: whether these may be stored in 8 bits, and in 4.
_ASKED = (KV_CACHE, TensorClass.PLE_PROJECTIONS, TensorClass.PLE_MODEL_PROJECTION)
_ASKED_BITS = (8, 4)


def asked(run: Run) -> dict[str, list[AtWidth]]:
    """The KV cache and the PLE projections at 8 and at 4 bits; those alone that were measured, as the noise floor."""
    found = {str(name): [one for bits in _ASKED_BITS if (one := _at_width(run, name, bits))] for name in _ASKED}
    return {name: widths for name, widths in found.items() if widths}


def _at_width(run: Run, tensor_class: str, bits: int) -> AtWidth | None:
    # On the evaluation text alone: the noise floor is of no other.
    whole = [one for one in run.of(SensitivityRecord, text=EVALUATION, layer=None) if one.kl_divergence is not None]
    inside = [one for one in whole if one.tensor_class == tensor_class and _bits(one) == bits]
    least = min(inside, key=lambda one: one.kl_divergence or 0.0, default=None)
    of_noise = quotient(least.kl_divergence, policies.noise_floor(run)) if least else None
    if least is None or of_noise is None:
        return None
    others = [
        one.kl_per_mb
        for one in whole
        if KV_CACHE not in (one.tensor_class, tensor_class)
        and one.tensor_class != tensor_class
        and width(one) == width(least)
        and one.kl_per_mb is not None
    ]
    return AtWidth(bits, least, of_noise, quotient(least.kl_per_mb, statistics.median(others)) if others else None)


def _bits(record: SensitivityRecord) -> float | None:
    """Of every code; None where they differ."""
    storage = record.storage
    if isinstance(storage, WeightSpec):
        formats = {storage.format}
    else:
        formats = {part.format for layer in (storage.full, storage.sliding) for part in (*layer.k, *layer.v)}
    bits = {math.log2(FORMATS[name].num_levels) if name in FORMATS else None for name in formats}
    return bits.pop() if len(bits) == 1 else None
