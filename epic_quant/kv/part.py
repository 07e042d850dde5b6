"""`Part`: what is stored of some dims of one layer's K or V, as packed bytes, scales, and tokens not yet quantized.

Tokens are in one of three places, oldest first: the `first` ones, kept as they came; the body, quantized a unit at a
time; the tail, kept as it came. A unit is one token, or a whole block where channels share a scale over time; blocks
begin at multiples of their length, so that none waits in a text of whole blocks. A unit enters the body once `recent`
newer tokens are there, and its place depends on nothing but the token's position, so the same tokens are stored alike
however they were cut into appends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from epic_quant.kv.body import Body
from epic_quant.kv.rows import Rows, joined
from epic_quant.kv.storage import Storage


class Held(NamedTuple):
    """Where a part's tokens are: of the first kind, units of the body, and in the tail."""

    first: int
    units: int
    tail: int


class Part:
    """`num_heads` heads of `num_dims` dims each; with `window`, a ring of that many tokens, rounded up to units.

    Tokens that are not quantized are held in `dtype`; where the storage is plain, all of them, in that of the storage.
    Raises QuantizationError where the storage does not fit the dims.
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
        self._body: Body | None = None
        if isinstance(storage.how, torch.dtype):
            dtype, self._first_tokens = storage.how, 0
        else:
            block = storage.block if window is None or storage.block is None else min(storage.block, window)
            self._recent = recent if window is None else min(recent, window)
            unit = block or 1
            most = None if window is None else -(-(window - self._recent) // unit)
            lead = self._first_tokens % unit
            self._body = Body(storage, num_heads, num_dims, block, most, lead)
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
        x = joined(pieces)
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
        fixed = self._body.fixed_nbytes if held.units else 0
        return (held.first + held.tail) * self._tail.row_nbytes + units * self._body.unit_nbytes + fixed

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
