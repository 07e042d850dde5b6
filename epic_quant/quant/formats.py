"""Weights to stored matrices and back. A format is one module here and its row in `spec.formats`."""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from epic_quant.errors import QuantizationError
from epic_quant.quant.gptq import Hessian
from epic_quant.quant.stored import StoredMatrix
from epic_quant.spec import FORMATS, WeightSpec


class Format(ABC):
    """What every storage format provides. Its module has a tuple `FORMATS` of those that it implements."""

    name: str

    @abstractmethod
    def quantize(
        self, weight: Tensor, spec: WeightSpec, hessian: Tensor | Hessian | None = None, backend: str | None = None
    ) -> StoredMatrix:
        """As `quant.quantize`, which has checked that `weight` is a matrix of floats."""

    @abstractmethod
    def from_tensors(
        self, spec: WeightSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int], backend: str | None = None
    ) -> StoredMatrix:
        """The inverse of `StoredMatrix.tensors`, whose names, dtypes and shapes `quant.from_tensors` checks."""

    @abstractmethod
    def layout(self, spec: WeightSpec, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor that is stored of a matrix of that shape."""


def quantize(
    weight: Tensor, spec: WeightSpec, hessian: Tensor | Hessian | None = None, *, backend: str | None = None
) -> StoredMatrix:
    """`weight` [rows, cols], of any float dtype and finite in fp32, as `spec` stores it, row by row.

    `hessian` [cols, cols], fp32 or fp64, is the mean of x xᵀ over the layer's inputs x; only gptq, yaqa and imatrix
    read it, and a `Hessian` keeps what they make of it for the next weight or spec. yaqa needs its `output` as well,
    and rounds row after row, so rows of its result are not those of a part of the weight. `backend` names what
    computes, here and with the result: an instruction set, or `reference`; by default, what `quant.backends.default`
    says. Raises QuantizationError for a weight or Hessian that does not fit.
    """
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise QuantizationError(f"a {weight.dtype} tensor of shape {list(weight.shape)} is no matrix of floats")
    if weight.is_meta:
        raise QuantizationError("a tensor on meta has no values")
    return format_named(spec.format).quantize(weight, spec, hessian, backend)


def from_tensors(
    spec: WeightSpec, tensors: Mapping[str, Tensor], shape: Sequence[int], *, backend: str | None = None
) -> StoredMatrix:
    """The matrix of that shape whose `tensors()` these are; they are kept, not copied.

    Raises QuantizationError where they are not what `spec` stores of such a matrix.
    """
    rows, cols = shape
    stored_as = format_named(spec.format)
    expected = stored_as.layout(spec, (rows, cols))
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != expected:
        actual, wanted = (
            ", ".join(f"{name} {dtype} {list(size)}" for name, (dtype, size) in layout.items()) or "nothing"
            for layout in (found, expected)
        )
        raise QuantizationError(f"a matrix {[rows, cols]} in {spec} is stored as {wanted}; found {actual}")
    return stored_as.from_tensors(spec, tensors, (rows, cols), backend)


def check_finite(values: Tensor, rows: slice | Tensor) -> None:
    """Raise QuantizationError that names the first of these rows, `values` [n, cols], with NaN or infinity."""
    finite = torch.linalg.vector_norm(values, ord=float("inf"), dim=1).isfinite()
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise not_finite(rows.start + first if isinstance(rows, slice) else int(rows[first]))


def not_finite(row: int) -> QuantizationError:
    """The error for a row with NaN or infinity."""
    return QuantizationError(f"NaN or infinity in row {row}")


@functools.cache
def format_named(name: str) -> Format:
    """The implementation of a format in `spec.FORMATS`; QuantizationError where only published files have it."""
    if name not in FORMATS:
        raise QuantizationError(f"{name} is only read from published files")
    module = importlib.import_module(f"epic_quant.quant.{FORMATS[name].module}")
    found: Format = next(one for one in module.FORMATS if one.name == name)
    return found
