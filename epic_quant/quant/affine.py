"""affine2 to affine8: evenly spaced levels from the least value of a group to its largest; none is clipped.

For keys and values: their channels have means far from zero, and attention looks most at the keys that stand out most,
which a scale of least squares would clip. It is what KIVI (Liu et al., 2024) stores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epic_quant.quant.bitpack import BitPacking
from epic_quant.quant.grouped import GroupedFormat
from epic_quant.quant.scales import over_scale


@dataclass(frozen=True)
class Affine(GroupedFormat):
    """value = zero_point + s * code, code in [0, 2^b - 1]; a group's scales are s and the zero point, in that order."""

    num_bits: int

    def fit(self, groups: Tensor) -> Tensor:
        least, largest = torch.aminmax(groups, dim=1, keepdim=True)
        # Divided apart, since the difference may overflow.
        return torch.cat([largest / self._top - least / self._top, least], dim=1)

    def encode(self, groups: Tensor, scale: Tensor) -> Tensor:
        step, zero_point = scale.split(1, dim=1)
        return over_scale(groups - zero_point, step).round_().clamp_(0, self._top).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        step, zero_point = scale.split(1, dim=1)
        return torch.addcmul(zero_point, codes.float(), step)

    @property
    def _top(self) -> int:
        return (1 << self.num_bits) - 1


FORMATS = tuple(Affine(f"affine{bits}", BitPacking(bits), bits) for bits in range(2, 9))
