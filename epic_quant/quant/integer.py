"""int2 to int8: evenly spaced levels, with a scale that makes the squared error least."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from epic_quant.quant.backends import Rule
from epic_quant.quant.bitpack import BitPacking
from epic_quant.quant.grouped import GroupedFormat
from epic_quant.quant.scales import least_squares_scale, over_scale


@dataclass(frozen=True)
class Integer(GroupedFormat):
    """value = s * code, code in [-2^(b-1), 2^(b-1) - 1], stored as code + 2^(b-1).

    The scale may be negative: so the one level more on the negative side falls to the side with the larger weight,
    which costs no bit.
    """

    num_bits: int
    gaussian_step: float

    @cached_property
    def rule(self) -> Rule:
        return Rule(
            self.packing.coding,
            tuple(range(-self._half, self._half)),
            gaussian_step=self.gaussian_step,
            peak_level=self._half,
            either_sign=True,
        )

    def fit(self, groups: Tensor) -> Tensor:
        sign = torch.where(groups.amax(dim=1, keepdim=True) > -groups.amin(dim=1, keepdim=True), -1.0, 1.0)
        return sign * least_squares_scale(
            groups * sign, self._round, gaussian_step=self.gaussian_step, peak_level=self._half
        )

    def encode(self, groups: Tensor, scale: Tensor) -> Tensor:
        return self._round(over_scale(groups, scale)).add_(self._half).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes.float().sub_(self._half) * scale

    @property
    def _half(self) -> int:
        return 1 << (self.num_bits - 1)

    def _round(self, ratio: Tensor) -> Tensor:
        return ratio.round_().clamp_(-self._half, self._half - 1)


# The best step of a uniform quantizer with 2^b levels for a unit Gaussian: Max (1960), table II, continued to 8 bits.
_GAUSSIAN_STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}

FORMATS = tuple(Integer(f"int{bits}", BitPacking(bits), bits, step) for bits, step in _GAUSSIAN_STEPS.items())
