"""Ternary: -s, 0 or +s, with the threshold and the scale that make the squared error least."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from epic_quant.quant.backends import Rule
from epic_quant.quant.bitpack import TritPacking
from epic_quant.quant.grouped import GroupedFormat
from epic_quant.quant.scales import least_squares_scale, over_scale

# The outer level of Max's (1960) three-level quantizer for a unit Gaussian.
_GAUSSIAN_STEP = 1.2240


@dataclass(frozen=True)
class Ternary(GroupedFormat):
    """value = s * code, code in -1, 0, 1, stored as code + 1; the threshold is s / 2, as nearest levels demand."""

    @cached_property
    def rule(self) -> Rule:
        return Rule(self.packing.coding, (-1, 0, 1), gaussian_step=_GAUSSIAN_STEP, peak_level=1)

    def fit(self, groups: Tensor) -> Tensor:
        return least_squares_scale(groups, _round, gaussian_step=_GAUSSIAN_STEP, peak_level=1)

    def encode(self, groups: Tensor, scale: Tensor) -> Tensor:
        return _round(over_scale(groups, scale)).add_(1).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes.float().sub_(1) * scale


def _round(ratio: Tensor) -> Tensor:
    return ratio.round_().clamp_(-1, 1)


FORMATS = (Ternary("ternary", TritPacking()),)
