"""Least squares for blocks: codes, and scales and minima of groups, which are whole multiples of the block's own.

A value is `d k q`, or `d k q - e m` where groups have minima: q is a weight's level, k and m are small whole numbers of
its group, d and e are fp16 numbers of the block. The search has three steps:

1. Each candidate of a grid chooses levels, for which the group's best scale and minimum are a regression.
2. Those of the best candidate are rounded to multiples of d and e. The neighbours of k are tried too, each with m and
   the levels chosen anew.
3. For these k, m and q, the best d and e are a regression again; the levels are the nearest under them.

Weights come as [size, groups, n], fp32: a group's lie along dim 0. All arithmetic is elementwise, sums included, so the
same block gives the same bytes on every machine and among any others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from epic_quant.quant.scales import stored_scale

# Weights beyond this have scales that saturate anyway, and squares must not overflow.
_MAX = 2.0**30
# What is smaller has no scale in fp16, and its inverse could overflow.
_TINY = 2.0**-60

# Where the search puts a group's largest weight: steps beyond the outermost level. Ternary groups are long.
_EXCESS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
_TERNARY_EXCESS = (-0.1, 0.15, 0.4, 0.65, 0.9, 1.15, 1.5, 2.0, 2.7, 3.7)
# Where groups have minima: steps by which the levels reach over the range of the weights, and by which they begin above
# the least weight.
_GRID = tuple((over, above) for over in (-1.0, -0.4, 0.2, 0.8) for above in (0.0, 0.4))
# Outermost multiples that a block's largest scale is tried as.
_NUM_ENDS = 5


@dataclass(frozen=True)
class Levels:
    """The values that a code stands for, in ascending order."""

    values: tuple[int, ...]

    def nearest(self, ratio: Tensor) -> Tensor:
        """The nearest value to each ratio, in place where it can be."""
        if self._is_even:
            return ratio.round_().clamp_(self.values[0], self.values[-1])
        return self.decode(self.encode(ratio))

    def encode(self, values: Tensor) -> Tensor:
        """Codes, uint8, of the values themselves or what is nearest to them."""
        if self._is_even:
            return (values - self.values[0]).to(torch.uint8)
        # Halfway between two whole numbers is a multiple of a half, so that a table has the nearest for every half.
        halves = (values * 2).ceil_().clamp_(2 * self.values[0], 2 * self.values[-1]).sub_(2 * self.values[0])
        return self._of_halves.to(values.device).index_select(0, halves.view(-1).int()).view(values.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """Values, fp32, of codes, uint8."""
        if self._is_even:
            return codes.float().add_(self.values[0])
        table = torch.tensor(self.values, dtype=torch.float32, device=codes.device)
        return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)

    @property
    def peaks(self) -> list[float]:
        """Where the search puts a group's largest weight: some steps within or beyond the outermost levels."""
        first, second, before, last = (self.values[index] for index in (0, 1, -2, -1))
        beyond = _EXCESS if len(self.values) > 3 else _TERNARY_EXCESS
        above = [] if first == -last else [last + excess * (last - before) for excess in beyond]
        return [first + excess * (first - second) for excess in beyond] + above

    @cached_property
    def _of_halves(self) -> Tensor:
        """The code nearest to every half from the first level to the last; the lower one halfway between two."""
        middles = torch.tensor(self.values[:-1]) + torch.tensor(self.values[1:])
        return torch.bucketize(torch.arange(2 * self.values[0], 2 * self.values[-1] + 1), middles).to(torch.uint8)

    @cached_property
    def _is_even(self) -> bool:
        return len(self.values) == self.values[-1] - self.values[0] + 1


class Fitted(NamedTuple):
    """What is stored of blocks, as whole numbers in fp32 but for `scale` and `min_scale` [n], which fp16 has.

    `levels` [size, groups, n]; `multiples` and `min_multiples` [groups, n].
    """

    levels: Tensor
    scale: Tensor
    multiples: Tensor
    min_scale: Tensor
    min_multiples: Tensor


def fit_scales(x: Tensor, weights: Tensor | None, levels: Levels, multiples: range) -> Fitted:
    """Blocks without minima: `x` [size, groups, n] as `levels` with scales that are `multiples` of the block's.

    `weights`, in the shape of x, are what squared errors count; None is 1.
    """
    x = x.clamp(-_MAX, _MAX)

    def products(q: Tensor) -> tuple[Tensor, Tensor]:
        """<x, q> and <q, q> of every group."""
        weighted = q if weights is None else q * weights
        return _sum(weighted * x), _sum(weighted * q)

    def candidate(inverse: Tensor) -> tuple[Tensor, ...]:
        xq, qq = products(levels.nearest(x * inverse))
        best = xq * _inverse(qq)
        return xq * best, best, qq

    to_largest = _inverse(_largest(x))
    _, best, qq = _most(candidate(to_largest * peak) for peak in levels.peaks)

    def block_scale(end: int) -> tuple[Tensor, ...]:
        """That with which the largest scale is `end` times it, as a regression on those multiples corrects it."""
        k = _multiple(best, stored_scale(_largest(best) / end).float(), multiples)
        scale = stored_scale(_sum(qq * best * k) * _inverse(_sum(qq * k * k))).float()
        return -_sum(qq * (scale * k - best).square_()), scale

    _, scale = _most(block_scale(end) for end in sorted(multiples, key=abs)[: -1 - _NUM_ENDS : -1])

    def neighbour(k: Tensor) -> tuple[Tensor, ...]:
        k = k.clamp(multiples[0], multiples[-1])
        xq, qq = products(levels.nearest(x * _inverse(scale * k)))
        return scale * k * (2 * xq - scale * k * qq), k, xq, qq

    near = _multiple(best, scale, multiples)
    _, k, xq, qq = _most(neighbour(near + step) for step in ((-1, 0, 1) if len(multiples) > 1 else (0,)))
    scale = stored_scale(_sum(xq * k) * _inverse(_sum(qq * k * k))).float()
    return Fitted(levels.nearest(x * _inverse(scale * k)), scale, k, torch.zeros_like(scale), torch.zeros_like(k))


def fit_scales_and_minima(x: Tensor, weights: Tensor | None, levels: Levels, multiples: range) -> Fitted:
    """Blocks whose groups have minima, which are at most 0; scales are at least 0. Otherwise as `fit_scales`."""
    x = x.clamp(-_MAX, _MAX)
    least = x.amin(0).clamp_(max=0)
    y = x - least  # sums of y lose fewer digits than those of x
    inverse_range = _inverse(y.amax(0))
    ones = torch.full_like(least, len(x)) if weights is None else _sum(weights)
    sum_y = _sum(y if weights is None else y * weights)
    sum_x = sum_y + least * ones

    def products(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """<1, q>, <q, q> and <y, q> of every group."""
        weighted = q if weights is None else q * weights
        return _sum(weighted), _sum(weighted * q), _sum(weighted * y)

    def candidate(q: Tensor) -> tuple[Tensor, ...]:
        """The part of <x, x> that the best a q + b explains, a and b; b is at most 0."""
        sum_q, qq, yq = products(q)
        xq = yq + least * sum_q
        inverse = _inverse((ones * qq - sum_q * sum_q).clamp_(min=0))  # 0 where all levels are the same
        b = torch.where(inverse > 0, (qq * sum_y - sum_q * yq) * inverse, sum_y * _inverse(ones)) + least
        without_minimum = (b > 0) | (inverse == 0) & (sum_q > 0)
        a = torch.where(without_minimum, xq * _inverse(qq), (ones * yq - sum_y * sum_q) * inverse)
        b = b.masked_fill(without_minimum, 0)
        return a * xq + b * sum_x, a, b

    to_top = [(levels.values[-1] + over, above) for over, above in _GRID]
    _, a, b = _most(candidate(levels.nearest(y * (inverse_range * top) - above)) for top, above in to_top)
    scale, min_scale = (stored_scale(largest / multiples[-1]).float() for largest in (a.amax(0), -b.amin(0)))

    def neighbour(k: Tensor) -> tuple[Tensor, ...]:
        k = k.clamp(multiples[0], multiples[-1])
        a = scale * k
        q = levels.nearest((x - b) * _inverse(a))
        m = _multiple((a * _sum(q if weights is None else q * weights) - sum_x) * _inverse(ones), min_scale, multiples)
        e = min_scale * m
        sum_q, qq, yq = products(levels.nearest((x + e) * _inverse(a)))
        xq = yq + least * sum_q
        return a * (2 * xq - a * qq) - e * (2 * sum_x + e * ones - 2 * a * sum_q), k, m, sum_q, qq, xq

    near = _multiple(a, scale, multiples)
    _, k, m, sum_q, qq, xq = _most(neighbour(near + step) for step in (-1, 0, 1))
    # The whole block's squared error is d² kk - 2 d e km + e² mm - 2 d xk + 2 e xm, and <x, x>.
    kk, km, mm, xk, xm = (_sum(t) for t in (k * k * qq, k * m * sum_q, m * m * ones, k * xq, m * sum_x))
    inverse = _inverse((kk * mm - km * km).clamp_(min=0))
    refitted = [stored_scale(t * inverse).float() for t in (mm * xk - km * xm, km * xk - kk * xm)]

    def explained(d: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        return d * (2 * xk - d * kk) - e * (2 * xm + e * mm - 2 * d * km), d, e

    _, scale, min_scale = _most(explained(d, e) for d, e in ((scale, min_scale), refitted))
    return Fitted(levels.nearest((x + min_scale * m) * _inverse(scale * k)), scale, k, min_scale, m)


def _multiple(values: Tensor, scale: Tensor, multiples: range) -> Tensor:
    """The multiple of `scale` [n] that is nearest to each value [groups, n]."""
    return (values * _inverse(scale)).round_().clamp_(multiples[0], multiples[-1])


def _largest(x: Tensor) -> Tensor:
    """The value of largest magnitude along dim 0, with its sign."""
    least, most = x.aminmax(dim=0)
    return torch.where(most > -least, most, least)


def _sum(x: Tensor) -> Tensor:
    """The sum along dim 0, whose length is a power of two, by halves."""
    while len(x) > 1:
        half = len(x) // 2
        x = x[:half] + x[half:]
    return x[0]


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is next to nothing."""
    return torch.where(x.abs() < _TINY, 0.0, 1 / x)


def _most(candidates: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Elementwise the candidate whose first value is the largest, and the first of those that are equal."""
    others = iter(candidates)
    best = next(others)
    for other in others:
        better = other[0] > best[0]
        best = tuple(torch.where(better, new, old) for new, old in zip(other, best, strict=True))
    return best
