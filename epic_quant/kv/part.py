"""`Part`: what is stored of some dims of one layer's K or V, as packed bytes, scales, and tokens not yet quantized.

Tokens are in one of three places, oldest first: the `first` ones, kept as they came; the body, quantized a unit at a
time; the tail, kept as it came. A unit is one token, or a whole block where channels share a scale over time. A unit
enters the body once `recent` newer tokens are there, and its place depends on nothing but the token's position, so
the same tokens are stored alike however they were cut into appends.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from epic_quant.kv.rows import Rows
from epic_quant.kv.storage import Storage
from epic_quant.quant import QuantizedTensor, Quantizer, hadamard


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
            dtype, self._first_tokens, unit = storage.how, 0, 1
        else:
            block = storage.block if window is None or storage.block is None else min(storage.block, window)
            self._recent = recent if window is None else min(recent, window)
            most = None if window is None else -(-(window - self._recent) // (block or 1))
            self._body = _Body(storage.how, num_heads, num_dims, block, most)
            unit = self._body.unit
        self._first = Rows(self._shape, dtype)
        self._tail = Rows(self._shape, dtype, window if self._body is None else self._recent + unit - 1)

    def append(self, x: Tensor) -> None:
        """Add the tokens x [tokens, num_heads, num_dims], finite in fp32."""
        old = self._ever(self._tokens)
        self._tokens += len(x)
        new = self._ever(self._tokens)
        self._first.append(x[: new.first - old.first])
        x = x[new.first - old.first :]
        if self._body is not None and new.units > old.units:
            leaving = (new.units - old.units) * self._body.unit
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
        return (held.first + held.tail) * self._tail.row_nbytes + units * self._body.unit_nbytes

    def _ever(self, tokens: int) -> Held:
        """Where `tokens` tokens have gone, counting units that a ring has dropped since."""
        first = min(tokens, self._first_tokens)
        if self._body is None:
            return Held(0, 0, tokens)
        units = max(0, tokens - first - self._recent) // self._body.unit
        return Held(first, units, tokens - first - units * self._body.unit)

    def _rows(self) -> list[Rows]:
        body = [] if self._body is None else [self._body.packed, self._body.scale]
        return [self._first, self._tail, *body]


class _Body:
    """Quantized units. Rows of the quantizer are a token's dims, or a channel's values over a block of tokens."""

    def __init__(
        self, quantizer: Quantizer, num_heads: int, num_dims: int, block: int | None, most: int | None
    ) -> None:
        self.unit, self.most = block or 1, most
        self._shape, self._block = (num_heads, num_dims), block
        turned = hadamard.block_for(num_dims, quantizer.hadamard_block)
        # A row of dims is turned by the quantizer; where it is a channel's, the dims are turned here.
        self._turned = 0 if block is None else turned
        self._quantizer = Quantizer(quantizer.scheme, quantizer.group_size, 0 if self._turned else turned)
        self._cols = num_dims if block is None else block
        rows = num_heads if block is None else num_heads * num_dims
        packed, scales = _row_shape(self._quantizer, self._cols)
        self.packed = Rows((rows, packed), torch.uint8, most)
        self.scale = Rows((rows, scales), torch.float16, most)

    @property
    def unit_nbytes(self) -> int:
        """Bytes of one unit."""
        return self.packed.row_nbytes + self.scale.row_nbytes

    def append(self, x: Tensor) -> None:
        """Quantize whole units of tokens, x [tokens, num_heads, num_dims]; not those that a ring would drop at once."""
        if self.most is not None:
            x = x[max(0, len(x) - self.most * self.unit) :]
        if not len(x):
            return
        values = x.float()
        if self._turned:
            values = hadamard.turn(values, self._turned)
        if self._block is not None:
            values = values.unflatten(0, (-1, self._block)).permute(0, 2, 3, 1)  # [units, heads, dims, block]
        stored = self._quantizer.quantize(values.reshape(-1, self._cols))
        units = len(x) // self.unit
        self.packed.append(stored.packed.view(units, *self.packed.shape))
        self.scale.append(stored.scale.view(units, *self.scale.shape))

    def read(self, dtype: torch.dtype) -> Tensor:
        """All tokens, [tokens, num_heads, num_dims]."""
        packed, scale = self.packed.rows().flatten(0, 1), self.scale.rows().flatten(0, 1)
        stored = QuantizedTensor(packed, scale, self._cols, self._quantizer)
        values = stored.dequantize(torch.float32 if self._turned else dtype)
        if self._block is not None:
            # [units, heads, dims, block] to [units, block, heads, dims]
            values = values.view(len(self.packed), *self._shape, self._block).permute(0, 3, 1, 2)
        values = values.reshape(len(self.packed) * self.unit, *self._shape)
        return hadamard.turn_back(values, self._turned).to(dtype) if self._turned else values


@functools.cache
def _row_shape(quantizer: Quantizer, cols: int) -> tuple[int, int]:
    """Bytes and scales of a row, read off one that is really quantized."""
    stored = quantizer.quantize(torch.zeros(1, cols))
    return stored.packed.shape[1], stored.scale.shape[1]
