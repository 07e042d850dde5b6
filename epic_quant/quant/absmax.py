"""The original project's formats: the scale comes from the largest weight alone.

Codes are chosen with the scale in fp32 and decoded with its fp16 value, as published. `absmax2` continues them to
two bits, for the dims of K and V to which the original gives that many without naming a quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from epic_quant.quant.backends import Rule
from epic_quant.quant.bitpack import BitPacking
from epic_quant.quant.grouped import GroupedFormat
from epic_quant.quant.scales import over_scale


@dataclass(frozen=True)
class Absmax(GroupedFormat):
    """s = max|w| / divisor; code = clamp(round(w / s), low, high), stored as code - low."""

    divisor: float
    low: int
    high: int

    _rounding = "nearest"

    @cached_property
    def rule(self) -> Rule:
        return Rule(self.packing.coding, tuple(range(self.low, self.high + 1)), self._rounding, divisor=self.divisor)

    def fit(self, groups: Tensor) -> Tensor:
        return groups.abs().amax(dim=1, keepdim=True) / self.divisor

    def encode(self, groups: Tensor, scale: Tensor) -> Tensor:
        return self._round(over_scale(groups, scale)).sub_(self.low).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes.float().add_(self.low) * scale

    def _round(self, ratio: Tensor) -> Tensor:
        return ratio.round_().clamp_(self.low, self.high)


@dataclass(frozen=True)
class AbsmaxTernary(Absmax):
    """s = max|w|; code = +1 above 0.33 s, -1 below -0.33 s, else 0."""

    _rounding = "sign"

    def _round(self, ratio: Tensor) -> Tensor:
        return (ratio > 0.33).float().sub_((ratio < -0.33).float())


FORMATS = (
    AbsmaxTernary("absmax-ternary", BitPacking(2), divisor=1, low=-1, high=1),
    Absmax("absmax2", BitPacking(2), divisor=2, low=-2, high=1),
    Absmax("absmax3", BitPacking(4), divisor=4, low=-4, high=3),
    Absmax("absmax3-packed", BitPacking(3), divisor=4, low=-4, high=3),
    Absmax("absmax4", BitPacking(4), divisor=7, low=-8, high=7),
)
