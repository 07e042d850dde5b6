"""A matrix product with a plain or stored weight: the one place that distinguishes the two."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from epic_quant.errors import QuantizationError, SpecError, unknown
from epic_quant.quant.backends import ACTIVATIONS
from epic_quant.quant.stored import Weight


def linear(x: Tensor, weight: Weight, activations: str = "fp32") -> Tensor:
    """`x` [..., cols] times weight [rows, cols] transposed: [..., rows], in the dtype of x.

    `activations` says in what form a packed weight meets x: "fp32", or "int8", rounded to 8 bits with a scale for every
    block of a row, where there is a kernel for that (`StoredMatrix.computed_by`).
    Raises SpecError for other activations and QuantizationError for inner dims that differ.
    """
    if activations not in ACTIVATIONS:
        raise SpecError(unknown("activations", activations, ACTIVATIONS))
    if x.shape[-1] != weight.shape[1]:
        raise QuantizationError(f"x has rows of {x.shape[-1]}, but the weight has rows of {weight.shape[1]}")
    if isinstance(weight, Tensor):
        return functional.linear(x, weight.to(x.dtype))
    return weight.matmul(x, activations)
