"""`Part`: what is stored of some dims of one layer's K or V, as packed bytes, scales, and tokens not yet quantized.

Tokens are in one of three places, oldest first: the `first` ones, kept as they came; the body, quantized a unit at a
time; the tail, kept as it came. A unit is one token, or a whole block where channels share a scale over time; blocks
begin at multiples of their length, so that none waits in a text of whole blocks. A unit enters the body once `recent`
newer tokens are there, and its place depends on nothing but the token's position, so the same tokens are stored alike
however they were cut into appends.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from epic_quant.kv.rows import Rows
from epic_quant.kv.storage import Storage
from epic_quant.quant import QuantizedTensor, Quantizer, hadamard
from epic_quant.quant.base import MOST_TURNED
from epic_quant.quant.scheme import SCALE_DTYPE, over_scale, stored_scale


class Held(NamedTuple):
    """Where a part's tokens are: of the first kind, units of the body, and in the tail."""

    first: int
    units: int
    tail: int


class Part:
    """`num_heads` heads of `num_dims` dims each; with `window`, a ring of that many tokens, rounded up to units.

    Tokens that are not quantized are held in `dtype`; where the storage is plain, all of them, in that of the storage.
    Raises QuantizationError where the storage's groups do not divide the dims.
    """

    def __init__(
        self,
        storage: Storage,
        num_heads: int,
        num_dims: int,
        *,
        window: int | None = None,
        first: int = 0,
        recent: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._shape, self._window, self._tokens = (num_heads, num_dims), window, 0
        self._first_tokens, self._recent = first if window is None else 0, recent
        self._body: _Body | None = None
        if isinstance(storage.how, torch.dtype):
            dtype, self._first_tokens = storage.how, 0
        else:
            block = storage.block if window is None or storage.block is None else min(storage.block, window)
            self._recent = recent if window is None else min(recent, window)
            unit = block or 1
            most = None if window is None else -(-(window - self._recent) // unit)
            lead = self._first_tokens % unit
            self._body = _Body(storage, num_heads, num_dims, block, most, lead)
        self._first = Rows(self._shape, dtype)
        most_waiting = window if self._body is None else self._recent + self._body.least * unit - 1
        self._tail = Rows(self._shape, dtype, most_waiting)

    def append(self, x: Tensor) -> None:
        """Add the tokens x [tokens, num_heads, num_dims], finite in fp32."""
        old = self._ever(self._tokens)
        self._tokens += len(x)
        new = self._ever(self._tokens)
        self._first.append(x[: new.first - old.first])
        x = x[new.first - old.first :]
        if self._body is not None and new.units > old.units:
            leaving = len(self._tail) + len(x) - new.tail
            from_tail = min(leaving, len(self._tail))
            self._body.append(torch.cat([self._tail.rows()[:from_tail], x[: leaving - from_tail]]))
            self._tail.drop(from_tail)
            x = x[leaving - from_tail :]
        self._tail.append(x)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tokens held, at most the window's newest, oldest first: [kept, num_heads, num_dims] in `dtype`.

        There must be one. The result may be a view that later appends overwrite.
        """
        pieces = [self._tail.rows()]
        if self._body is not None:
            pieces = [self._first.rows(), self._body.read(dtype), *pieces]
        pieces = [piece.to(dtype) for piece in pieces if len(piece)]
        x = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return x if self._window is None else x[-self._window :]

    def reset(self) -> None:
        """Forget all tokens; what was allocated stays for the next ones."""
        self._tokens = 0
        for rows in self._rows():
            rows.drop(len(rows))

    @property
    def nbytes(self) -> int:
        """Bytes stored of the tokens held."""
        return sum(rows.nbytes for rows in self._rows())

    @property
    def allocated_nbytes(self) -> int:
        """The same with the spare room of the tensors that grow."""
        return sum(rows.allocated_nbytes for rows in self._rows())

    def nbytes_after(self, tokens: int) -> int:
        """What `nbytes` is once `tokens` tokens have come, from the bytes of a single token and a single unit."""
        held = self._ever(tokens)
        if self._body is None:
            return (tokens if self._window is None else min(tokens, self._window)) * self._tail.row_nbytes
        units = held.units if self._body.most is None else min(held.units, self._body.most)
        offset = self._body.offset_nbytes if held.units else 0
        return (held.first + held.tail) * self._tail.row_nbytes + units * self._body.unit_nbytes + offset

    def _ever(self, tokens: int) -> Held:
        """Where `tokens` tokens have gone, counting units that a ring has dropped since."""
        first = min(tokens, self._first_tokens)
        if self._body is None:
            return Held(0, 0, tokens)
        lead, unit = self._body.lead, self._body.unit
        # The body begins at the last border between units that is not after the first tokens.
        units = max(0, tokens - first + lead - self._recent) // unit
        if units < self._body.least:
            return Held(first, 0, tokens - first)
        return Held(first, units, tokens - first + lead - units * unit)

    def _rows(self) -> list[Rows]:
        body = [] if self._body is None else self._body.rows()
        return [self._first, self._tail, *body]


class _Body:
    """Quantized units. Rows of the quantizer are a token's dims, or a channel's values over a block of tokens.

    The first `lead` places of the first block are of tokens that are kept elsewhere. They hold the token after them,
    since the first tokens of a text, which draw attention, are unlike all others and would widen the block's range.

    With `center`, the mean of the first units that hold so many tokens, for every head and channel, is taken off before
    quantizing and put back on reading. A ring takes no more of them than it holds.
    """

    def __init__(
        self, storage: Storage, num_heads: int, num_dims: int, block: int | None, most: int | None, lead: int
    ) -> None:
        assert isinstance(storage.how, Quantizer)
        quantizer, center = storage.how, storage.center
        self.unit, self.most, self.lead = block or 1, most, lead
        # Units that the body begins with, at least.
        self.least = -(-(center or 1) // self.unit)
        if most is not None:
            self.least = max(1, min(self.least, most))
        self._shape, self._block, self._centered = (num_heads, num_dims), block, center is not None
        self._clipped, self._unbiased = (storage.clip or 0) / 100, storage.unbiased
        turned = hadamard.block_for(num_dims, quantizer.hadamard_block)
        # A row of dims is turned by the quantizer; a channel's, or one that is clipped after it, is turned here.
        self._turned = turned if block is not None or self._clipped else 0
        self._quantizer = Quantizer(quantizer.scheme, quantizer.group_size, 0 if self._turned else turned)
        self._cols = num_dims if block is None else block
        rows = num_heads if block is None else num_heads * num_dims
        packed, scales = _row_shape(self._quantizer, self._cols)
        self._packed = Rows((rows, packed), torch.uint8, most)
        self._scale = Rows((rows, scales), SCALE_DTYPE, most)
        self._offset = Rows(self._shape, SCALE_DTYPE)  # one row once it is known

    @property
    def unit_nbytes(self) -> int:
        """Bytes of one unit."""
        return self._packed.row_nbytes + self._scale.row_nbytes

    @property
    def offset_nbytes(self) -> int:
        """Bytes that a body with any units has beside them."""
        return self._offset.row_nbytes if self._centered else 0

    def rows(self) -> list[Rows]:
        """All that is stored."""
        return [self._packed, self._scale, self._offset]

    def append(self, x: Tensor) -> None:
        """Quantize tokens x [tokens, num_heads, num_dims] that fill whole units, together with the lead the first time.

        Those that a ring would drop at once are not stored.
        """
        # Beyond that scales saturate anyway, and the sums of a mean or a turn must not overflow.
        values = x.float().clamp(-MOST_TURNED, MOST_TURNED)
        if self._centered and not len(self._offset):
            begin = values[: self.least * self.unit - self.lead]
            self._offset.append(stored_scale(begin.mean(dim=0, keepdim=True)))
        if self.lead and not len(self._packed):
            values = torch.cat([values[:1].expand(self.lead, -1, -1), values])
        if self.most is not None:
            values = values[max(0, len(values) - self.most * self.unit) :]
        if not len(values):
            return
        units = len(values) // self.unit
        if self._centered:
            values = values - self._offset.rows()
        if self._turned:
            values = hadamard.turn(values, self._turned)
        if self._block is not None:
            values = values.unflatten(0, (-1, self._block)).permute(0, 2, 3, 1)  # [units, heads, dims, block]
        values = values.reshape(-1, self._cols)
        if self._clipped:
            values = _clipped(values, self._clipped)
        stored = self._quantizer.quantize(values)
        scale = _unbiased_scale(stored, values) if self._unbiased else stored.scale
        self._packed.append(stored.packed.view(units, *self._packed.shape))
        self._scale.append(scale.view(units, *self._scale.shape))

    def read(self, dtype: torch.dtype) -> Tensor:
        """All tokens without the lead, [tokens, num_heads, num_dims]."""
        packed, scale = self._packed.rows().flatten(0, 1), self._scale.rows().flatten(0, 1)
        stored = QuantizedTensor(packed, scale, self._cols, self._quantizer)
        values = stored.dequantize(torch.float32 if self._turned or self._centered else dtype)
        if self._block is not None:
            # [units, heads, dims, block] to [units, block, heads, dims]
            values = values.view(len(self._packed), *self._shape, self._block).permute(0, 3, 1, 2)
        values = values.reshape(len(self._packed) * self.unit, *self._shape)[self.lead :]
        if self._turned:
            values = hadamard.turn_back(values, self._turned)
        if len(self._offset):
            values = values + self._offset.rows()
        return values.to(dtype)


def _clipped(rows: Tensor, part: float) -> Tensor:
    """Each row with the outer part of its range, at either end, moved to where that begins."""
    least, largest = rows.aminmax(dim=1, keepdim=True)
    low, high = ((1 - part) * end + part * other for end, other in ((least, largest), (largest, least)))
    return rows.clamp(low, high)


def _unbiased_scale(stored: QuantizedTensor, rows: Tensor) -> Tensor:
    """The scale of each row with which <row, row as read> = <row, row>."""
    rows = rows.clamp(-(2.0**30), 2.0**30)  # Beyond, scales saturate anyway, and squares must not overflow.
    norm, product = (torch.linalg.vecdot(rows, other).unsqueeze(1) for other in (rows, stored.dequantize()))
    return stored_scale(stored.scale * over_scale(norm, product))


@functools.cache
def _row_shape(quantizer: Quantizer, cols: int) -> tuple[int, int]:
    """Bytes and scales of a row, read off one that is really quantized."""
    stored = quantizer.quantize(torch.zeros(1, cols))
    return stored.packed.shape[1], stored.scale.shape[1]
