"""What every scheme provides, and the search for a scale that several of them share.

A group is `size` weights in a row of the matrix that share their scale; schemes see groups as [n, size], fp32, and
know nothing of rows, packing, rotation or error compensation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epic_quant.kernels.quantizing import Rule
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

    @property
    def rule(self) -> Rule | None:
        """What kernels must know to quantize and decode as this does; None where none do."""
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

    `nearest` maps w / s to level values, whole numbers of at most 7 bits, in place if it likes. Five scales are tried,
    from somewhat below the one that is best for a long Gaussian group (`gaussian_step`, for a standard deviation of 1)
    to somewhat above the one that puts the largest weight on `peak_level`; that peak scale itself,
    which finds weights that lie on such a grid already; and a seventh where the parabola through the best three of the
    five has its top. Each chooses levels, for which the best scale is <w, q> / <q, q>. The result is exactly
    representable in fp16.

    It is the same to the bit on every machine: weights are taken as whole numbers of 24 bits, the largest magnitude's
    first place being the first, so that all sums are exact in fp64 in any order; the rest is arithmetic that IEEE 754
    defines to the last bit.
    """
    # Beyond this a scale saturates anyway.
    groups = groups.clamp(-(2.0**30), 2.0**30)
    places = (groups.abs().amax(dim=1, keepdim=True).view(torch.int32) >> 23) - 126
    exponent = 24 - places.clamp(min=-100)
    whole = (groups * _power_of_two(exponent)).round_()
    to_peak = peak_level / whole.abs().amax(dim=1, keepdim=True).double().clamp(min=1)
    # Squares of 16 bits, whose sums are exact too.
    squares = (whole / 256).round_().double().square().sum(dim=1, keepdim=True).clamp(min=1)
    to_gaussian = 1 / ((squares / groups.shape[1]).sqrt() * (256 * gaussian_step))
    coarsest, finest = to_peak / 1.1, torch.maximum(to_gaussian, to_peak) / 0.9
    ratio = (finest / coarsest).sqrt().sqrt()

    inverses = [coarsest]
    while len(inverses) < 5:
        inverses.append(inverses[-1] * ratio)
    tried = [_refit(whole, inverse, nearest) for inverse in inverses]
    gains = torch.cat([gain for _, gain in tried], dim=1)
    middle = gains.argmax(dim=1, keepdim=True).clamp_(1, 3)
    before, here, after = (gains.gather(1, middle + step) for step in (-1, 0, 1))
    below, at, over = (torch.cat(inverses, dim=1).gather(1, middle + step) for step in (-1, 0, 1))
    curvature = before - 2 * here + after
    offset = ((before - after) / (2 * curvature)).clamp(-1, 1).masked_fill(curvature == 0, 0)
    # The parabola through the three inverses, so that it is as geometric as they are.
    top = at + offset * ((over - below) / 2 + offset * ((over + below) / 2 - at))
    tried += [_refit(whole, to_peak, nearest), _refit(whole, top.clamp(below, over), nearest)]

    scales, gains = (torch.cat(parts, dim=1) for parts in zip(*tried, strict=True))
    best = scales.gather(1, gains.argmax(dim=1, keepdim=True)) * _power_of_two(-exponent).double()
    return stored_scale(best.float()).float()


def _refit(whole: Tensor, inverse: Tensor, nearest: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The least-squares scale for the levels that 1 / `inverse` chooses, and the part of ‖w‖² that it explains."""
    levels = nearest(whole * inverse.float()).double()
    norm = levels.square().sum(dim=1, keepdim=True)
    product = (whole * levels).sum(dim=1, keepdim=True)
    scale = over_scale(product, norm)
    return scale, product * scale


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exactly: int32 in [-126, 127] to fp32."""
    return ((exponent + 127) << 23).view(torch.float32)
