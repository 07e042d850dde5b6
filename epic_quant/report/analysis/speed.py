"""Which block and which product is fastest."""

from __future__ import annotations

from dataclasses import dataclass

from epic_quant.records.subjects import BlockRecord, KernelsRecord
from epic_quant.report.formatting import quotient
from epic_quant.results.run import Run, distinct
from epic_quant.spec import REFERENCE

# What products with packed weights are compared with.
TORCH_BF16 = "torch bf16"


@dataclass(frozen=True)
class Extremes:
    """The fastest and the slowest of what was timed, each with its time in units of the reference's."""

    of: str
    fastest: tuple[str, float]
    slowest: tuple[str, float]


def blocks(run: Run) -> list[Extremes]:
    """Of each layer type, policies at one token."""
    records = run.of(BlockRecord, tokens=1)
    return [
        found
        for layer_type in distinct(one.layer_type for one in records)
        if (
            found := _extremes(
                layer_type, {o.policy: o.time_s for o in records if o.layer_type == layer_type}, REFERENCE
            )
        )
    ]


def products(run: Run) -> list[Extremes]:
    """Of each weight, ways to multiply by it at one token."""
    records = run.of(KernelsRecord, tokens=1)
    return [
        found
        for weight in distinct(one.weight for one in records)
        if (found := _extremes(weight, {o.how: o.time_s for o in records if o.weight == weight}, TORCH_BF16))
    ]


def gbs(nbytes: float | None, seconds: float | None) -> float | None:
    """Bytes over seconds, in GB/s."""
    speed = quotient(nbytes, seconds)
    return None if speed is None else speed / 1e9


def _extremes(of: str, times_s: dict[str, float | None], reference: str) -> Extremes | None:
    ratios = {
        name: ratio
        for name, seconds in times_s.items()
        if name != reference and (ratio := quotient(seconds, times_s.get(reference))) is not None
    }
    if not ratios:
        return None
    fastest, slowest = (choose(ratios.items(), key=lambda item: item[1]) for choose in (min, max))
    return Extremes(of, fastest, slowest)
