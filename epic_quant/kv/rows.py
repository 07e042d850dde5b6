"""`Rows`: a queue of rows in one preallocated tensor, the newest in at one end, the oldest out at the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(pieces: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The pieces one after the other, of which there must be one: itself and no copy where it is alone."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)


class Rows:
    """Rows of one shape and dtype. With `most`, a ring: what exceeds it pushes the oldest out.

    Storage is one circular tensor that grows by half, so an append costs its own rows alone, amortized.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, most: int | None = None) -> None:
        self._buffer = torch.empty(0, *shape, dtype=dtype)
        self._oldest, self._len, self._most = 0, 0, most

    def __len__(self) -> int:
        return self._len

    @property
    def shape(self) -> torch.Size:
        """Of one row."""
        return self._buffer.shape[1:]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return self.shape.numel() * self._buffer.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held."""
        return self._buffer[: self._len].nbytes

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the tensor that holds them, spare rows included."""
        return self._buffer.nbytes

    def append(self, rows: Tensor) -> None:
        """Copy in rows [n, *shape], oldest first."""
        if self._most is not None:
            rows = rows[max(0, len(rows) - self._most) :]
            self.drop(max(0, self._len + len(rows) - self._most))
        self._reserve(self._len + len(rows))
        capacity = len(self._buffer)
        begin = (self._oldest + self._len) % max(1, capacity)
        before_wrap = min(len(rows), capacity - begin)
        self._buffer[begin : begin + before_wrap] = rows[:before_wrap]
        self._buffer[: len(rows) - before_wrap] = rows[before_wrap:]
        self._len += len(rows)

    def drop(self, count: int) -> None:
        """Drop the `count` oldest."""
        self._oldest = (self._oldest + count) % max(1, len(self._buffer))
        self._len -= count

    def rows(self) -> Tensor:
        """All of them [len, *shape], oldest first: a view, which later appends overwrite, or where they wrap a copy."""
        end = self._oldest + self._len
        if end <= len(self._buffer):
            return self._buffer[self._oldest : end]
        return torch.cat([self._buffer[self._oldest :], self._buffer[: end - len(self._buffer)]])

    def _reserve(self, count: int) -> None:
        capacity = len(self._buffer)
        if count <= capacity:
            return
        grown = max(count, capacity + capacity // 2)
        if self._most is not None:
            grown = min(grown, self._most)
        buffer = self._buffer.new_empty(grown, *self._buffer.shape[1:])
        buffer[: self._len] = self.rows()
        self._buffer, self._oldest = buffer, 0
