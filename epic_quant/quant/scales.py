"""Scales as they are stored, and the search for one that several formats share.

A group is `size` weights of a row that share their scale; groups come as [n, size], fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SCALE_DTYPE = torch.float16
_SCALE_MAX = torch.finfo(SCALE_DTYPE).max


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
