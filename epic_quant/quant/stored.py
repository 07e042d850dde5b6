"""`StoredMatrix`: a matrix as a storage format keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from epic_quant.spec import WeightSpec


@runtime_checkable
class StoredMatrix(Protocol):
    """A matrix [rows, cols] in a storage format. It lies, and is computed with, on the device of its tensors."""

    @property
    def spec(self) -> WeightSpec:
        """Its format and options, with the Hadamard block that fits its rows."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        ...

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each element of the matrix."""
        ...

    def rows(self, ids: Tensor) -> StoredMatrix:
        """Only the rows `ids` [n], integers, in that order; others are not read. IndexError if one is out of range."""
        ...

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [rows, cols]; what `dtype` cannot hold saturates."""
        ...

    def matmul(self, x: Tensor, activations: str = "fp32") -> Tensor:
        """`x` [..., cols] times the transposed matrix: [..., rows] in the dtype of x. `quant.linear` checks shapes."""
        ...

    def computed_by(self, activations: str = "fp32") -> str:
        """The backend that multiplies by it, and the form of its activations: `avx2, int8 activations`."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, one row of the matrix in each row; `quant.from_tensors` reads them back."""
        ...


Weight = Tensor | StoredMatrix


def bits_per_weight(matrix: StoredMatrix) -> float:
    """What `StoredMatrix.bits_per_weight` is; 0 for a matrix without elements."""
    rows, cols = matrix.shape
    return 8 * matrix.nbytes / max(1, rows * cols)


def row_chunks(rows: int, cols: int, numel: int) -> Iterator[slice]:
    """Slices of rows that hold about `numel` weights each."""
    step = max(1, numel // cols)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def joined_rows(chunks: Iterable[tuple[slice, Tensor]], like: StoredMatrix, dtype: torch.dtype) -> Tensor:
    """The matrix whose rows the chunks are, fp32 and written to, in `dtype`; what that cannot hold saturates."""
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    decoded = torch.empty(like.shape, dtype=dtype, device=next(iter(like.tensors().values())).device)
    for rows, values in chunks:
        decoded[rows] = values.clamp_(-limit, limit)
    return decoded


def product_of_rows(x: Tensor, chunks: Iterable[tuple[slice, Tensor]], num_rows: int) -> Tensor:
    """`x` [..., cols] times the transposed matrix of these rows: [..., num_rows] in the dtype of x."""
    out = x.new_empty(*x.shape[:-1], num_rows)
    for rows, values in chunks:
        out[..., rows] = functional.linear(x, values.to(x.dtype))
    return out
