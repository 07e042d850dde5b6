"""codebook2 to codebook4: the levels that are best for a Gaussian, as int8 tables, so that a look-up decodes them."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from epic_quant.quant.backends import Rule
from epic_quant.quant.bitpack import BitPacking
from epic_quant.quant.grouped import GroupedFormat
from epic_quant.quant.scales import least_squares_scale, over_scale


@dataclass(frozen=True)
class Codebook(GroupedFormat):
    """value = s * table[code], with 2^num_bits ascending int8 entries and the scale of least squared error."""

    num_bits: int

    @functools.cached_property
    def rule(self) -> Rule:
        return Rule(
            self.packing.coding,
            tuple(self.table.tolist()),
            "table",
            gaussian_step=self._gaussian_step,
            peak_level=127,
        )

    @property
    def _gaussian_step(self) -> float:
        return lloyd_max_levels(1 << self.num_bits)[-1] / 127

    def fit(self, groups: Tensor) -> Tensor:
        values = self.decode(_codes_by_half_steps(self.num_bits), torch.ones(())).to(groups.device)
        return least_squares_scale(
            groups, lambda ratio: _look_up(values, ratio), gaussian_step=self._gaussian_step, peak_level=127
        )

    def encode(self, groups: Tensor, scale: Tensor) -> Tensor:
        return _look_up(_codes_by_half_steps(self.num_bits).to(groups.device), over_scale(groups, scale))

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return self.table.to(codes.device).float().index_select(0, codes.reshape(-1).int()).view(codes.shape) * scale

    @property
    def table(self) -> Tensor:
        """The entries, [2^num_bits] int8: the levels for a unit Gaussian, with the last one as 127."""
        return _table(self.num_bits)


@functools.cache
def lloyd_max_levels(num_levels: int) -> tuple[float, ...]:
    """The levels, ascending, that make the mean squared error of a unit Gaussian least: Lloyd (1957), Max (1960).

    Thresholds midway between levels and levels at the mean of their cell, in turns, until nothing moves.
    """
    levels = tuple(4.0 * (index + 0.5) / num_levels - 2.0 for index in range(num_levels))
    moved = 1.0
    while moved > 1e-9:
        inner = [(low + high) / 2 for low, high in itertools.pairwise(levels)]
        borders = [-math.inf, *inner, math.inf]
        means = tuple(_cell_mean(low, high) for low, high in itertools.pairwise(borders))
        moved = max(abs(new - old) for new, old in zip(means, levels, strict=True))
        levels = means
    return levels


def lloyd_max_rel_l2(num_levels: int) -> float:
    """The least relative L2 that any scalar quantizer of so many levels has on a Gaussian: √(1 - Σ pᵢ lᵢ²)."""
    levels = lloyd_max_levels(num_levels)
    borders = [-math.inf, *((low + high) / 2 for low, high in itertools.pairwise(levels)), math.inf]
    masses = [_cell_mass(low, high) for low, high in itertools.pairwise(borders)]
    return math.sqrt(1.0 - sum(mass * level**2 for mass, level in zip(masses, levels, strict=True)))


def _cell_mean(low: float, high: float) -> float:
    """The mean of a unit Gaussian between two borders."""
    density = math.exp(-low * low / 2) - math.exp(-high * high / 2)
    return density / math.sqrt(2 * math.pi) / _cell_mass(low, high)


def _cell_mass(low: float, high: float) -> float:
    """The probability that a unit Gaussian lies between two borders."""
    return (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2


@functools.cache
def _table(num_bits: int) -> Tensor:
    levels = lloyd_max_levels(1 << num_bits)
    return torch.tensor([round(127 * level / levels[-1]) for level in levels], dtype=torch.int8)


# Entries are integers, so a threshold between two of them is a multiple of 1/2: between two such multiples the nearest
# entry is the same, and a table of half steps from -128 to 127.5 finds it exactly.
@functools.cache
def _codes_by_half_steps(num_bits: int) -> Tensor:
    entries = _table(num_bits).float()
    middles = (torch.arange(512) - 256) / 2 + 0.25
    return (middles.unsqueeze(1) - entries).abs().argmin(dim=1).to(torch.uint8)


def _look_up(by_half_steps: Tensor, ratio: Tensor) -> Tensor:
    """The table's answer for each ratio, in units of an entry; `ratio` is overwritten."""
    index = ratio.mul_(2).floor_().clamp_(-256, 255).add_(256).int()
    return by_half_steps.index_select(0, index.view(-1)).view(index.shape)


FORMATS = tuple(Codebook(f"codebook{bits}", BitPacking(bits), bits) for bits in (2, 3, 4))
