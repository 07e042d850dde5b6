"""`Segment`: some dims of one layer's K or V: attention sinks, quantized tokens, and tokens not quantized yet.

Tokens are in one of three places, oldest first: the attention sinks, kept as they came; the quantized store, which
they enter a unit at a time; the residual, kept as it came. A unit is one token, or a whole block where channels share a
scale over time; blocks begin at multiples of their length, so that none waits in a text of whole blocks. A unit is
quantized once `residual_window` newer tokens are there, and its place depends on nothing but the token's position, so
the same tokens are stored alike however they were cut into updates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from epic_quant.kv.quantized_store import QuantizedStore
from epic_quant.kv.rows import Rows, joined
from epic_quant.spec import KVStorageSpec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Held(NamedTuple):
    """Where a segment's tokens are: attention sinks, units of the store, and in the residual."""

    sinks: int
    units: int
    residual: int


class Segment:
    """`num_heads` heads of `num_dims` dims each; with `window`, a ring of that many tokens, rounded up to units.

    Tokens that are not quantized are held in `dtype`; where the storage is plain, all of them, in that of the storage.
    Raises QuantizationError where the storage does not fit the dims.
    """

    def __init__(
        self,
        spec: KVStorageSpec,
        num_heads: int,
        num_dims: int,
        *,
        window: int | None = None,
        attention_sinks: int = 0,
        residual_window: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._shape, self._window, self._tokens = (num_heads, num_dims), window, 0
        self._num_sinks, self._residual_window = attention_sinks if window is None else 0, residual_window
        self._store: QuantizedStore | None = None
        if spec.is_plain:
            dtype, self._num_sinks = DTYPES[spec.format], 0
        else:
            block = spec.block_tokens
            if window is not None:
                block = None if block is None else min(block, window)
                self._residual_window = min(residual_window, window)
            unit = block or 1
            most = None if window is None else -(-(window - self._residual_window) // unit)
            self._store = QuantizedStore(spec, num_heads, num_dims, block, most, self._num_sinks % unit)
        self._sinks = Rows(self._shape, dtype)
        waiting = window if self._store is None else self._residual_window + self._store.least * self._store.unit - 1
        self._residual = Rows(self._shape, dtype, waiting)

    def append(self, x: Tensor) -> None:
        """Add the tokens x [tokens, num_heads, num_dims], finite in fp32."""
        old = self._ever(self._tokens)
        self._tokens += len(x)
        new = self._ever(self._tokens)
        self._sinks.append(x[: new.sinks - old.sinks])
        x = x[new.sinks - old.sinks :]
        if self._store is not None and new.units > old.units:
            leaving = len(self._residual) + len(x) - new.residual
            waited = min(leaving, len(self._residual))
            self._store.append(torch.cat([self._residual.rows()[:waited], x[: leaving - waited]]))
            self._residual.drop(waited)
            x = x[leaving - waited :]
        self._residual.append(x)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tokens held, at most the window's newest, oldest first: [kept, num_heads, num_dims] in `dtype`.

        There must be one. The result may be a view that later appends overwrite.
        """
        pieces = [self._residual.rows()]
        if self._store is not None:
            pieces = [self._sinks.rows(), self._store.read(dtype), *pieces]
        pieces = [piece.to(dtype) for piece in pieces if len(piece)]
        x = joined(pieces)
        return x if self._window is None else x[-self._window :]

    def reset(self) -> None:
        """Drop all tokens; allocated memory is kept for the next ones."""
        self._tokens = 0
        for rows in (self._sinks, self._residual):
            rows.drop(len(rows))
        if self._store is not None:
            self._store.reset()

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
        if self._store is None:
            return (tokens if self._window is None else min(tokens, self._window)) * self._residual.row_nbytes
        units = held.units if self._store.most is None else min(held.units, self._store.most)
        fixed = self._store.fixed_nbytes if held.units else 0
        return (held.sinks + held.residual) * self._residual.row_nbytes + units * self._store.unit_nbytes + fixed

    def _ever(self, tokens: int) -> Held:
        """Where `tokens` tokens have gone, counting units that a ring has dropped since."""
        sinks = min(tokens, self._num_sinks)
        if self._store is None:
            return Held(0, 0, tokens)
        padding, unit = self._store.padding, self._store.unit
        # The store begins at the last border between units that is not after the sinks.
        units = max(0, tokens - sinks + padding - self._residual_window) // unit
        if units < self._store.least:
            return Held(sinks, 0, tokens - sinks)
        return Held(sinks, units, tokens - sinks + padding - units * unit)

    def _rows(self) -> list[Rows]:
        stored = [] if self._store is None else self._store.rows()
        return [self._sinks, self._residual, *stored]
