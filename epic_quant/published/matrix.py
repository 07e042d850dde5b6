"""`PublishedMatrix`: a matrix as a published file stores it, decoded some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epic_quant.quant.backends import REFERENCE
from epic_quant.quant.stored import bits_per_weight, joined_rows, product_of_rows, row_chunks
from epic_quant.spec import WeightSpec

# Weights decoded at a time: temporaries of 1 MB in fp32 stay in a core's cache.
_CHUNK = 2**18

Decode = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class PublishedMatrix:
    """`stored` tensors by name, a row of the matrix in each row of each; `decode` makes fp32 [rows, cols] of some."""

    stored: Mapping[str, Tensor]
    cols: int
    spec: WeightSpec
    decode: Decode

    def __repr__(self) -> str:
        return f"PublishedMatrix({self.spec}, {list(self.shape)}, {self.bits_per_weight:.3f} bits a weight)"

    @property
    def shape(self) -> tuple[int, int]:
        return len(next(iter(self.stored.values()))), self.cols

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored.values())

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(self)

    def rows(self, ids: Tensor) -> PublishedMatrix:
        return replace(self, stored={name: tensor.index_select(0, ids) for name, tensor in self.stored.items()})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return joined_rows(self._decoded_chunks(), self, dtype)

    def matmul(self, x: Tensor, activations: str = "fp32") -> Tensor:
        """As `StoredMatrix.matmul`; rows are decoded some at a time. Activations are never rounded."""
        return product_of_rows(x, self._decoded_chunks(), self.shape[0])

    def computed_by(self, activations: str = "fp32") -> str:
        return REFERENCE

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.stored)

    def _decoded_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in row_chunks(*self.shape, _CHUNK):
            yield rows, self.decode({name: tensor[rows] for name, tensor in self.stored.items()})
