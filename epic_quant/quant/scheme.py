"""What every scheme provides, and the search for a scale that several of them share.

A group is `size` weights in a row of the matrix that share their scale; schemes see groups as [n, size], fp32, and
know nothing of rows, packing, rotation or error feedback.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epic_quant.quant.bitpack import Packing

SCALE_DTYPE = torch.float16
_SCALE_MAX = torch.finfo(SCALE_DTYPE).max


@dataclass(frozen=True)
class Scheme(ABC):
    """How the weights of a group become codes and back."""

    name: str
    packing: Packing

    scales_per_group = 1

    @property
    @abstractmethod
    def num_levels(self) -> int:
        """Values that a weight can take at a given scale, however many bits a code is stored in."""

    @property
    def levels(self) -> Sequence[int] | None:
        """What the codes from 0 on stand for in units of the scale, where all are whole numbers in [-128, 127]."""
        return None

    @abstractmethod
    def fit(self, groups: Tensor) -> Tensor:
        """The scale of each group: [n, size] fp32 to [n, scales_per_group] fp32."""

    @abstractmethod
    def encode(self, groups: Tensor, scale: Tensor) -> Tensor:
        """Codes of the nearest values under that scale: [n, size] fp32 to [n, size] uint8."""

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The values that codes stand for: [n, size] uint8 to [n, size] fp32. A zero scale gives zeros."""


def stored_scale(scale: Tensor) -> Tensor:
    """fp32 scales as they are stored: fp16, where overflow saturates and what is below half of 2^-24 becomes zero."""
    return scale.clamp(-_SCALE_MAX, _SCALE_MAX).to(SCALE_DTYPE)


def over_scale(groups: Tensor, scale: Tensor) -> Tensor:
    """The quotient groups / scale, and zeros where the scale is zero."""
    return groups / scale.masked_fill(scale == 0, math.inf)


def least_squares_scale(
    groups: Tensor, nearest: Callable[[Tensor], Tensor], *, gaussian_step: float, peak_level: float
) -> Tensor:
    """The scale s that makes ‖w - s q‖ small, q being the nearest levels to w / s: [n, size] fp32 to [n, 1] fp32.

    `nearest` maps w / s to level values, in place if it likes. Four scales are tried, from somewhat below the one that
    is best for a long Gaussian group (`gaussian_step`, for a standard deviation of 1) to somewhat above the one that
    puts the largest weight on `peak_level`; a fifth where the parabola through the best three has its top; and that
    peak scale itself, which finds weights that lie on such a grid already. Each chooses levels, for which the best
    scale is <w, q> / <q, q>. The result is exactly representable in fp16.
    """
    # Beyond this a scale saturates anyway, and squares must not overflow.
    groups = groups.clamp(-(2.0**30), 2.0**30)
    peak = torch.linalg.vector_norm(groups, ord=math.inf, dim=1, keepdim=True) / peak_level
    gaussian = torch.linalg.vector_norm(groups, dim=1, keepdim=True) * (gaussian_step / math.sqrt(groups.shape[1]))
    low, high = torch.minimum(gaussian, peak) * 0.9, peak * 1.1

    tried = [_refit(groups, low ** (1 - step / 3) * high ** (step / 3), nearest) for step in range(4)]
    gains = torch.cat([gain for _, gain in tried], dim=1)
    middle = gains.argmax(dim=1, keepdim=True).clamp_(1, 2)
    before, here, after = (gains.gather(1, middle + offset) for offset in (-1, 0, 1))
    top = (middle + (before - after) / (2 * (before - 2 * here + after))).nan_to_num_(0).clamp_(0, 3) / 3
    tried += [_refit(groups, low ** (1 - top) * high**top, nearest), _refit(groups, peak, nearest)]

    scales, gains = (torch.cat(parts, dim=1) for parts in zip(*tried, strict=True))
    return stored_scale(scales.gather(1, gains.argmax(dim=1, keepdim=True))).float()


def _refit(groups: Tensor, scale: Tensor, nearest: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The least-squares scale for the levels that `scale` chooses, and the part of ‖w‖² that it explains."""
    levels = nearest(over_scale(groups, scale))
    norm = torch.linalg.vector_norm(levels, dim=1, keepdim=True).square()
    product = torch.linalg.vecdot(groups, levels).unsqueeze(1)
    refit = over_scale(product, norm)
    return refit, product * refit
