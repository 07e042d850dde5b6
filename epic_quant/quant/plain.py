"""bf16: values as they are, in two bytes. What every other format is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from epic_quant.quant.backends import REFERENCE
from epic_quant.quant.formats import Format, check_finite
from epic_quant.quant.gptq import Hessian
from epic_quant.quant.stored import StoredMatrix, bits_per_weight, product_of_rows, row_chunks
from epic_quant.spec import WeightSpec

# Weights that are cast at a time: 128 MB in fp32.
_CHUNK = 2**25
_MAX = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True, eq=False, repr=False)
class PlainMatrix:
    """`values` [rows, cols] bf16."""

    values: Tensor
    spec: WeightSpec

    def __repr__(self) -> str:
        return f"PlainMatrix({self.spec}, {list(self.shape)})"

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.values.shape
        return rows, cols

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(self)

    def rows(self, ids: Tensor) -> PlainMatrix:
        return replace(self, values=self.values.index_select(0, ids))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        limit = torch.finfo(dtype).max
        if limit < torch.finfo(self.values.dtype).max:
            return self.values.float().clamp_(-limit, limit).to(dtype)
        return self.values.to(dtype, copy=True)

    def matmul(self, x: Tensor, activations: str = "fp32") -> Tensor:
        """As `StoredMatrix.matmul`; rows are cast to the dtype of x some at a time. Activations are never rounded."""
        if x.dtype == self.values.dtype:
            return functional.linear(x, self.values)
        chunks = ((rows, self.values[rows]) for rows in row_chunks(*self.shape, _CHUNK))
        return product_of_rows(x, chunks, self.shape[0])

    def computed_by(self, activations: str = "fp32") -> str:
        return REFERENCE

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}


class Plain(Format):
    """Values in bf16."""

    name = "bf16"

    def quantize(
        self, weight: Tensor, spec: WeightSpec, hessian: Tensor | Hessian | None = None, backend: str | None = None
    ) -> StoredMatrix:
        """As `quant.quantize`; a weight in bf16 is kept and not copied."""
        is_bf16 = weight.dtype is torch.bfloat16
        values = (
            weight.contiguous() if is_bf16 else torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
        )
        for chunk in row_chunks(len(values), values.shape[1], _CHUNK):
            part = weight[chunk].float()
            check_finite(part, chunk)
            if not is_bf16:
                # Without the clamp, what lies between the largest numbers of bf16 and of fp32 would become infinite.
                values[chunk] = part.clamp(-_MAX, _MAX)
        return PlainMatrix(values, spec)

    def from_tensors(
        self, spec: WeightSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int], backend: str | None = None
    ) -> StoredMatrix:
        return PlainMatrix(tensors["values"], spec)

    def layout(self, spec: WeightSpec, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"values": (torch.bfloat16, shape)}


FORMATS = (Plain(),)
