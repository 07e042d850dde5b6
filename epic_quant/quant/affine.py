"""affine2 to affine8: evenly spaced levels from a zero point on, for values whose mean is far from zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epic_quant.quant.bitpack import BitPacking
from epic_quant.quant.integer import GAUSSIAN_STEPS
from epic_quant.quant.scheme import Scheme, least_squares_scale, over_scale


@dataclass(frozen=True)
class Affine(Scheme):
    """value = zero_point + s * code, code in [0, 2^b - 1]; a group's scales are s and the zero point, in that order."""

    num_bits: int
    gaussian_step: float

    scales_per_group = 2

    @property
    def num_levels(self) -> int:
        return 1 << self.num_bits

    def fit(self, groups: Tensor) -> Tensor:
        """The line of least squares through the codes that the best scale chooses around the mean, or the midrange."""
        groups = groups.clamp(-(2.0**30), 2.0**30)
        low, high = torch.aminmax(groups, dim=1, keepdim=True)
        lines, gains = zip(*(self._line(groups, c) for c in (groups.mean(1, True), (low + high) / 2)), strict=True)
        return torch.where(gains[0] > gains[1], *lines)

    def encode(self, groups: Tensor, scale: Tensor) -> Tensor:
        step, zero_point = scale.split(1, dim=1)
        return over_scale(groups - zero_point, step).round_().clamp_(0, self._top).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        step, zero_point = scale.split(1, dim=1)
        return torch.addcmul(zero_point, codes.float(), step)

    @property
    def _top(self) -> int:
        return (1 << self.num_bits) - 1

    def _line(self, groups: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point [n, 2], and the part of the variance that they explain [n, 1]."""
        centered, middle = groups - center, self._top / 2

        def levels(ratio: Tensor) -> Tensor:  # as far below zero as above it
            return ratio.add_(middle).round_().clamp_(0, self._top).sub_(middle)

        step = least_squares_scale(centered, levels, gaussian_step=self.gaussian_step, peak_level=middle)
        chosen = levels(over_scale(centered, step))
        chosen_mean, mean = chosen.mean(1, True), centered.mean(1, True)
        chosen = chosen - chosen_mean
        product = torch.linalg.vecdot(centered - mean, chosen).unsqueeze(1)
        step = over_scale(product, chosen.square().sum(1, True))
        return torch.cat([step, center + mean - step * (chosen_mean + middle)], dim=1), product * step


SCHEMES = tuple(Affine(f"affine{bits}", BitPacking(bits), bits, step) for bits, step in GAUSSIAN_STEPS.items())
