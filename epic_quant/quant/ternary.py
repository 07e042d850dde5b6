"""Ternary: -s, 0 or +s, with the threshold and the scale that make the squared error least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epic_quant.kernels.quantizing import Rule
from epic_quant.quant.bitpack import TritPacking
from epic_quant.quant.scheme import Scheme, least_squares_scale, over_scale

# The outer level of Max's (1960) three-level quantizer for a unit Gaussian.
_GAUSSIAN_STEP = 1.2240


@dataclass(frozen=True)
class Ternary(Scheme):
    """value = s * code, code in -1, 0, 1, stored as code + 1; the threshold is s / 2, as nearest levels demand."""

    @property
    def num_levels(self) -> int:
        return 3

    @property
    def levels(self) -> range:
        return range(-1, 2)

    @property
    def rule(self) -> Rule:
        return Rule(self.packing.coding, tuple(self.levels), gaussian_step=_GAUSSIAN_STEP, peak_level=1)

    def fit(self, groups: Tensor) -> Tensor:
        return least_squares_scale(groups, _round, gaussian_step=_GAUSSIAN_STEP, peak_level=1)

    def encode(self, groups: Tensor, scale: Tensor) -> Tensor:
        return _round(over_scale(groups, scale)).add_(1).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes.float().sub_(1) * scale


def _round(ratio: Tensor) -> Tensor:
    return ratio.round_().clamp_(-1, 1)


SCHEMES = (Ternary("ternary", TritPacking()),)
