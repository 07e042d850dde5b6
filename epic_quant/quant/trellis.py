"""trellis1 to trellis4: codes that overlap, so that few bits a weight choose among hundreds of values.

A bit-shift trellis, as Mao and Gray (2010) and Tseng et al., "QTIP" (2024): the bits of a row are a stream, and weight
i is the value of the state that the `state_bits` bits from bit i · num_bits of it on are, the lowest first. Neighbours
share all but num_bits of them, and a row is encoded by the search for the best path, Viterbi's (1967). Behind the row
the stream has zeros, so no bit is spent on where a path begins or ends; the last weights have fewer choices for it.

A state's value is looked up in two tables of 16 entries by the two halves of a byte, the upper one of the lower 16 bits
of state · multiplier: sums of two entries are as good as 256 of any kind, and a byte shuffle decodes them.

Whole pieces of 128 weights lie as eight streams of 16 weights side by side, [num_bits, 8] words of 16 bits, so that
what decodes a vector shifts all of it alike. The rest of a row are words in order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from epic_quant.kernels import matrix as kernels
from epic_quant.quant import backends, gptq
from epic_quant.quant.backends import Rule
from epic_quant.quant.bitpack import BitPacking
from epic_quant.quant.formats import format_named
from epic_quant.quant.grouped import GroupedFormat, ScaledFormat
from epic_quant.quant.scales import over_scale, stored_scale
from epic_quant.spec import FORMATS as SPEC_FORMATS
from epic_quant.spec import WeightSpec

_WORD = 16
_STREAMS = 8
_PIECE = _STREAMS * _WORD  # weights

# Columns whose path is decided together, and how many times the columns of a state are looked at beyond them, where the
# best paths to all states have long become one.
_TOGETHER = 1024
_AHEAD = 10
# By how much of it a scale may differ from that of a Gaussian before a path is searched for anew.
_FAR = 0.05
# The same where later columns compensate errors, in columns; and how many survivors and what follows them are compared
# in each column, since what its weight should be depends on the path.
_COMPENSATED_TOGETHER = 128
_COMPENSATED_AHEAD = 32
_COMPARED = 1024
_BIN_BITS = 8
# Scales saturate far below this, and the squares of its multiples must not overflow.
_MOST_WEIGHT = 2.0**30

# Weights and values are words of 16 bits, 8 of them for fractions of an entry, and so are costs: the upper halves of
# squared distances; with 3 bits or more, whose distances are smaller, of twice the distances.
_ONE = 2**8
_NO_PATH = 2**16 - 1
_MOST_COST = _NO_PATH - 1 - 2**14


@dataclass(frozen=True)
class Table:
    """The values of states: entries for the upper and the lower half of a byte, and how many make a deviation of 1.

    Found for Gaussian weights by Lloyd's (1957) iteration: the best path, and then the entries of least squared error.
    """

    multiplier: int
    upper: tuple[int, ...]
    lower: tuple[int, ...]
    deviation: float


@dataclass(frozen=True)
class Trellis(ScaledFormat):
    """value = s * (upper[byte >> 4] + lower[byte & 15]), the byte a hash of the state."""

    num_bits: int
    state_bits: int

    def with_options(self, spec: WeightSpec) -> Trellis:
        return replace(self, state_bits=spec.state_bits or self.state_bits)

    @cached_property
    def rule(self) -> Rule:
        table = self.table
        levels = table.upper + table.lower
        return Rule(self.name, levels, state_bits=self.state_bits, multiplier=table.multiplier)

    @property
    def table(self) -> Table:
        """The table of this many bits and state bits."""
        return _TABLES[self.num_bits, self.state_bits]

    def encode_rows(
        self, values: Tensor, group_size: int, factor: Tensor | None, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        # The deviation that is best for a Gaussian in scalar codes is also that which the table is for.
        fitted = self._scalar.stored_fit(values.reshape(-1, group_size), backend).float()
        scale = stored_scale(fitted * (self._scalar_deviation / self.table.deviation)).view(len(values), -1)
        if factor is not None:
            return self._pack(self._compensated_states(values, scale, factor, backend)), scale
        states, best, error = self._nearest_states(values, scale, backend)
        # Short groups, and outliers, may have a scale that differs much from that of a Gaussian: once more with it.
        odd = ((best.float() - scale.float()).abs() > _FAR * scale.float()).any(1).nonzero().flatten()
        if len(odd):
            again, scales, errors = self._nearest_states(values[odd], best[odd], backend)
            better = errors < error[odd]
            states[odd[better]], best[odd[better]] = again[better], scales[better]
        return self._pack(states), best

    def _nearest_states(self, values: Tensor, scale: Tensor, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """States nearest to `values` [rows, cols] under `scale` [rows, groups] fp16.

        Also the scale that is best for these states, and with that the squared error of each row.
        """
        rows, cols = values.shape
        by_column, words = _by_column(scale, cols), self._words(self.values.to(values.device))
        states = torch.empty(rows, cols, dtype=torch.int32, device=values.device)
        before = torch.full((rows,), -1, dtype=torch.int32, device=values.device)
        ahead = _AHEAD * -(-self.state_bits // self.num_bits)
        for start in range(0, cols, _TOGETHER):
            seen = slice(start, start + _TOGETHER + ahead)
            ratio = self._words(over_scale(values[:, seen], by_column[:, seen]))
            keep, ends = min(_TOGETHER, cols - start), seen.stop >= cols
            found = find_paths(ratio, words, self.num_bits, before, keep, ends=ends, backend=backend)
            states[:, start : start + keep], before = found, found[:, -1]
        found_values = self.values.to(values.device)[states]
        best = stored_scale(_least_squares(values, found_values, scale.shape[1]))
        error = (values - found_values * _by_column(best, cols)).square().sum(1)
        return states, best, error

    def _compensated_states(self, values: Tensor, scale: Tensor, factor: Tensor, backend: str | None) -> Tensor:
        """States of `values` [rows, cols] whose errors later columns make up for."""
        rows, cols = values.shape
        values = values.clamp(-_MOST_WEIGHT, _MOST_WEIGHT)  # a copy, since compensation overwrites it
        by_column, state_values = _by_column(scale, cols), self.values.to(values.device)
        states = torch.empty(rows, cols, dtype=torch.int32, device=values.device)
        before = torch.full((rows,), -1, dtype=torch.int32, device=values.device)

        def encode_block(start: int, rest: Tensor, own: Tensor) -> Tensor:
            nonlocal before
            seen = slice(start, start + _COMPENSATED_TOGETHER + _COMPENSATED_AHEAD)
            keep, ends = min(_COMPENSATED_TOGETHER, cols - start), seen.stop >= cols
            scales = by_column[:, seen]
            width = scales.shape[1]
            given = rest[:, :width], scales, own[:width, :width], state_values, self.num_bits, before, keep
            found = find_compensated_paths(*given, _COMPARED >> self.num_bits, ends=ends, backend=backend)
            states[:, start : start + keep], before = found, found[:, -1]
            return state_values[found] * scales[:, :keep]

        gptq.encode_blocks(values, factor, _COMPENSATED_TOGETHER, encode_block)
        return states

    def unpack(self, packed: Tensor, cols: int) -> Tensor:
        """The codes [rows, cols] uint8: values in units of the scale, from -128 on."""
        words: Tensor = self._in_order(packed, cols).view(torch.int16).long() & 0xFFFF
        words = torch.nn.functional.pad(words, (0, 2))
        first = torch.arange(cols, device=packed.device) * self.num_bits
        both = words[:, first // _WORD] | words[:, first // _WORD + 1] << _WORD
        states = both >> first % _WORD & (1 << self.state_bits) - 1
        return self._codes.to(packed.device)[states]

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return (codes.float() - 128) * scale

    def row_nbytes(self, cols: int) -> int:
        return -(-cols * self.num_bits // _WORD) * 2

    def _words(self, ratio: Tensor) -> Tensor:
        """Weights or values in units of an entry, in fp32, as int16 words with a fraction."""
        return (ratio * _ONE).round_().clamp_(-(2**15), 2**15 - 1).short()

    @cached_property
    def values(self) -> Tensor:
        """The value of every state of a path, [2^state_bits] fp32: a state whose first symbol is the highest."""
        return self._codes[_reversed(torch.arange(1 << self.state_bits), self.state_bits)].float() - 128

    @cached_property
    def _codes(self) -> Tensor:
        """The code of every state as it is stored, [2^state_bits] uint8."""
        byte = (torch.arange(1 << self.state_bits) * self.table.multiplier & 0xFFFF) >> 8
        upper, lower = torch.tensor(self.table.upper), torch.tensor(self.table.lower)
        return (upper[byte >> 4] + lower[byte & 15] + 128).to(torch.uint8)

    @property
    def _scalar(self) -> GroupedFormat:
        found = format_named(f"codebook{max(2, self.num_bits)}")
        assert isinstance(found, GroupedFormat)
        return found

    @property
    def _scalar_deviation(self) -> float:
        """What a scale of the scalar format is multiplied by to be the deviation of a Gaussian."""
        rule = self._scalar.rule
        assert rule is not None
        return 1 / rule.gaussian_step

    def _pack(self, states: Tensor) -> Tensor:
        """States of paths [rows, cols] as they are stored, [rows, row bytes] uint8."""
        cols = states.shape[1]
        symbols = _reversed(states >> (self.state_bits - self.num_bits), self.num_bits).to(torch.uint8)
        in_order = BitPacking(self.num_bits).pack(symbols)
        in_order = torch.nn.functional.pad(in_order, (0, self.row_nbytes(cols) - in_order.shape[1]))
        return self._side_by_side(in_order, cols, (_STREAMS, self.num_bits))

    def _in_order(self, packed: Tensor, cols: int) -> Tensor:
        return self._side_by_side(packed, cols, (self.num_bits, _STREAMS))

    def _side_by_side(self, packed: Tensor, cols: int, words: tuple[int, int]) -> Tensor:
        """Whole pieces, which are so many words, transposed; [rows, row bytes] uint8 to the same."""
        rows, pieces = len(packed), cols // _PIECE
        split = pieces * _STREAMS * self.num_bits * 2
        whole = packed[:, :split].reshape(rows, pieces, *words, 2).transpose(2, 3).reshape(rows, split)
        return torch.cat([whole, packed[:, split:]], dim=1)


def find_paths(
    x: Tensor, values: Tensor, bits: int, before: Tensor, keep: int, *, ends: bool, backend: str | None = None
) -> Tensor:
    """The states [rows, keep] int32 that the path nearest to each row x [rows, cols] int16 begins with.

    `values` [2^state_bits] int16, in the unit of x, are those of states whose first symbol, of `bits` bits, is the
    highest. The path goes on from the state `before` [rows], or from any where that is negative. With `ends`, only
    zeros follow the symbols of x, which is to be possible after `before`. `backend` as in `backends`.
    """
    if (isa := backends.isa_for(x.device, backend)) is not None:
        return kernels.find_paths(x, values, bits, before, keep, ends=ends, isa=isa)
    columns, values = x.T.int().unsqueeze(2), values.int()
    num_states, num_ends = len(values), len(values) >> bits
    follows = torch.arange(num_states, device=x.device) >> bits == (before % num_ends).unsqueeze(1)
    times = 2 if bits > 2 else 1
    costs = _error(columns[0], values, times).masked_fill(~(follows | (before < 0).unsqueeze(1)), _NO_PATH)
    best, base = [], torch.zeros(len(x), 1, dtype=torch.int32, device=x.device)
    for column in columns[1:]:
        least, which = costs.view(len(x), -1, num_ends).min(dim=1)
        best.append(which)
        counted = (least - base).clamp(max=_MOST_COST).masked_fill(least == _NO_PATH, _NO_PATH)
        costs = (counted.repeat_interleave(1 << bits, 1) + _error(column, values, times)).clamp_(max=_NO_PATH)
        base = least.amin(dim=1, keepdim=True) - base
    step = num_ends if ends else 1
    state = costs[:, ::step].argmin(dim=1) * step
    states = [state]
    for which in reversed(best):
        end = state >> bits
        state = which.gather(1, end.unsqueeze(1)).squeeze(1) * num_ends + end
        states.append(state)
    return torch.stack(states[::-1], dim=1)[:, :keep].int()


def find_compensated_paths(
    x: Tensor,
    scales: Tensor,
    factor: Tensor,
    values: Tensor,
    bits: int,
    before: Tensor,
    keep: int,
    most: int,
    *,
    ends: bool,
    backend: str | None = None,
) -> Tensor:
    """The states [rows, keep] int32 that a path through each row x [rows, cols] fp32 begins with.

    The columns that follow make up for errors, as `factor` [cols, cols], the upper inverse Cholesky factor, says: the
    sum of squared errors, each over the diagonal, is to be least. So many paths as `most` survive each column. `scales`
    are in the shape of x, `values` [2^state_bits] fp32 in the unit of these; all else as `find_paths`.
    """
    if (isa := backends.isa_for(x.device, backend)) is not None:
        given = x, scales, factor, values, bits, before, keep, most
        return kernels.find_compensated_paths(*given, ends=ends, isa=isa)
    own, over_diagonal = kernels.own_factors(factor), 1 / factor.diagonal()
    paths = [
        _compensated_path(row, scale, factor, own, over_diagonal, values, bits, int(first), most, ends)
        for row, scale, first in zip(x, scales, before, strict=True)
    ]
    return torch.stack(paths)[:, :keep].int()


def _compensated_path(
    x: Tensor,
    scales: Tensor,
    factor: Tensor,
    own: Tensor,
    over_diagonal: Tensor,
    values: Tensor,
    bits: int,
    before: int,
    most: int,
    ends: bool,
) -> Tensor:
    """The path [cols] of one row: products and sums are rounded one by one and in one order, as kernels do it."""
    num_own, num_states, columns = own.shape[1], len(values), x.clone()
    state_bits = num_states.bit_length() - 1
    state = torch.arange(num_states) if before < 0 else (before << bits) % num_states + torch.arange(1 << bits)
    parent = torch.zeros_like(state)
    errors, cost = torch.zeros(1, num_own), torch.zeros(1)
    paths: list[tuple[Tensor, Tensor]] = []
    for col in range(len(x)):
        place = col % num_own
        if col >= num_own:
            error = errors[cost.argmin(), place].clone()
            columns[col:] = columns[col:] - factor[col - num_own, col:] * error
            cost = cost.masked_fill(errors[:, place] != error, torch.inf)
        if col:
            state = ((paths[-1][0] << bits) % num_states).unsqueeze(1) + torch.arange(1 << bits)
            parent, state = torch.arange(len(state)).repeat_interleave(1 << bits), state.flatten()
        lanes = (errors * own[col]).view(len(errors), -1, 8)
        taken = lanes[:, 0]
        for later in range(1, lanes.shape[1]):
            taken = taken + lanes[:, later]
        for _ in range(3):
            taken = taken[:, ::2] + taken[:, 1::2]
        error = (columns[col] - taken[parent, 0] - values[state] * scales[col]) * over_diagonal[col]
        costs = cost[parent] + error * error
        zeros = max(0, col * bits + state_bits - len(x) * bits) if ends else 0
        costs = costs.masked_fill(
            state % (1 << min(zeros, state_bits if before < 0 and not col else bits)) != 0, torch.inf
        )
        picked = _least(costs, most)
        errors = errors[parent[picked]]
        errors[:, place], cost = error[picked], costs[picked]
        paths.append((state[picked], parent[picked]))
    best, found = cost.argmin(), []
    for of_column, parents in reversed(paths):
        found.append(of_column[best])
        best = parents[best]
    return torch.stack(found[::-1])


def _least(costs: Tensor, most: int) -> Tensor:
    """Which costs [n] fp32, at least 0, are the least, in their order: at most `most`, without those of infinity.

    They are whole bins of the range between the least and the largest, as kernels take them, or, where one bin has
    more, the first of it.
    """
    finite, bits = costs < torch.inf, costs.view(torch.int32)
    if finite.sum() > most:
        above = bits - bits.min()
        shift = max(0, int(above[finite].max()).bit_length() - _BIN_BITS)
        bins = above >> shift
        taken = int((torch.bincount(bins[finite]).cumsum(0) <= most).sum())
        finite &= bins < max(taken, 1)
    found = finite.nonzero().flatten()[:most]
    return found if len(found) else torch.zeros(1, dtype=torch.int64)  # where none is finite any will do


def _error(column: Tensor, values: Tensor, times: int) -> Tensor:
    """The cost [rows, states] int32 of each value [states] for each weight [rows, 1], by so many times the distance."""
    return (column - values).clamp_(-(2**15), 2**15 - 1).mul_(times).clamp_(-(2**15), 2**15 - 1).square_() >> 16


def _by_column(scale: Tensor, cols: int) -> Tensor:
    """The scale of every column, [rows, cols] fp32, of those of groups, [rows, groups] fp16."""
    return scale.float().repeat_interleave(cols // scale.shape[1], 1)


def _least_squares(weights: Tensor, values: Tensor, num_groups: int) -> Tensor:
    """Scales [rows, groups] fp32 of least squared error of `values` for `weights` [rows, cols]; 0 for zeros."""
    weights, values = (x.double().view(len(x), num_groups, -1) for x in (weights, values))
    norm = values.square().sum(2)
    return ((weights * values).sum(2) / norm.masked_fill(norm == 0, torch.inf)).float()


def _reversed(numbers: Tensor, num_bits: int) -> Tensor:
    """Whole numbers with their lowest `num_bits` bits in the opposite order."""
    flipped = torch.zeros_like(numbers)
    for bit in range(num_bits):
        flipped |= (numbers >> bit & 1) << (num_bits - 1 - bit)
    return flipped


# By bits and state bits.
_TABLES = {
    (1, 12): Table(
        39573,
        (-78, -59, -43, -27, -29, -18, -7, -9, 2, 3, 18, 35, 36, 43, 61, 76),
        (-49, -35, -32, -26, -19, -8, -13, -5, 7, 6, 15, 19, 26, 33, 37, 43),
        56.236,
    ),
    (2, 12): Table(
        16801,
        (-73, -49, -37, -31, -22, -16, -10, -3, 3, 9, 16, 23, 30, 39, 48, 73),
        (-53, -39, -30, -23, -17, -12, -7, -2, 2, 7, 12, 17, 23, 30, 38, 54),
        45.074,
    ),
    (3, 12): Table(
        26513,
        (-73, -48, -36, -29, -23, -16, -9, -3, 3, 9, 16, 23, 30, 38, 48, 73),
        (-54, -38, -30, -23, -17, -12, -7, -2, 2, 7, 12, 17, 23, 29, 39, 54),
        42.017,
    ),
    (4, 12): Table(
        48049,
        (-73, -47, -37, -30, -23, -16, -9, -3, 3, 9, 16, 23, 30, 38, 48, 73),
        (-54, -38, -29, -23, -17, -12, -7, -2, 2, 7, 12, 17, 23, 30, 38, 54),
        40.768,
    ),
    (1, 16): Table(
        30943,
        (-76, -62, -43, -55, -27, -24, -12, -13, 17, 14, 25, 23, 45, 39, 68, 78),
        (-49, -35, -23, -12, -11, -8, -7, -14, 9, 10, 10, 10, 22, 23, 32, 42),
        55.799,
    ),
    (2, 16): Table(
        37849,
        (-58, -44, -37, -29, -15, -13, -9, -2, 1, 9, 15, 20, 26, 32, 43, 63),
        (-64, -42, -30, -26, -18, -10, -8, -3, 4, 7, 15, 18, 23, 32, 43, 59),
        44.13,
    ),
    (3, 16): Table(
        9983,
        (-63, -44, -34, -26, -19, -14, -8, -3, 3, 7, 14, 20, 26, 32, 43, 63),
        (-63, -43, -32, -25, -20, -14, -7, -3, 3, 8, 14, 19, 26, 31, 42, 64),
        43.941,
    ),
    (4, 16): Table(
        30289,
        (-73, -48, -38, -30, -23, -16, -9, -3, 3, 9, 16, 22, 29, 37, 48, 73),
        (-54, -39, -28, -23, -17, -12, -7, -2, 2, 7, 12, 17, 23, 29, 38, 54),
        42.792,
    ),
}

FORMATS = tuple(
    Trellis(info.name, int(info.name[-1]), info.state_bits[0]) for info in SPEC_FORMATS.values() if info.state_bits
)
