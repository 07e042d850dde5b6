"""The kernels of each format and device; the torch code of `quant` is their reference.

A choice is a value: the name of an instruction set or `reference`; None stands for `default()`. It is passed where a
matrix is made, and the matrix keeps it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epic_quant import kernels
from epic_quant.errors import KernelError
from epic_quant.kernels import ACTIVATIONS, REFERENCE, matrix
from epic_quant.kernels.matrix import Format as Rule
from epic_quant.kernels.matrix import NativeMatrix as KernelMatrix
from epic_quant.kernels.matrix import Rotation
from epic_quant.spec import FORMATS

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "REFERENCE",
    "KernelMatrix",
    "Rotation",
    "Rule",
    "computed_by",
    "default",
    "kernels_for",
    "product",
]


def default() -> str:
    """The default backend: the fastest here, or what `EPIC_QUANT_ISA` names.

    Raises KernelError where that is none of what this machine has.
    """
    return kernels.isa()


def kernels_for(format_name: str, device: torch.device, backend: str | None) -> type[KernelMatrix] | None:
    """The kernels of a format on a device; None where the reference computes. KernelError for an unknown backend."""
    return None if _chosen(backend) == REFERENCE else BACKENDS.get((format_name, device.type))


def product(matrix: KernelMatrix | None, x: Tensor, activations: str) -> Tensor | None:
    """`x` times the matrix by a kernel; None where the reference computes.

    fp64, empty ones and gradients are for the reference, which knows no int8 activations.
    """
    if matrix is None or not _multiplies(matrix) or not x.numel() or x.dtype is torch.float64 or x.requires_grad:
        return None
    return matrix.matmul(x, activations)


def computed_by(matrix: KernelMatrix | None, activations: str) -> str:
    """As `StoredMatrix.computed_by`, of a matrix with its kernels."""
    return REFERENCE if matrix is None or not _multiplies(matrix) else f"{matrix.isa}, {activations} activations"


def _multiplies(matrix: KernelMatrix) -> bool:
    return matrix.has_matmul and matrix.shape[0] > 0


def rotate(x: Tensor, rotation: Rotation, backend: str | None, *, inverse: bool) -> Tensor | None:
    """Rows of x [..., cols] rotated, or rotated back, by a kernel; None where the reference computes."""
    isa = isa_for(x.device, backend)
    if isa is None or x.dtype is not torch.float32 or not x.numel():
        return None
    return None if x.requires_grad else matrix.rotate(x, rotation, inverse=inverse, isa=isa)


def isa_for(device: torch.device, backend: str | None) -> str | None:
    """The instruction set whose kernels compute with what lies on a device; None where the reference computes."""
    chosen = _chosen(backend)
    return None if chosen == REFERENCE or device.type != "cpu" else chosen


def _chosen(backend: str | None) -> str:
    if backend is None:
        return default()
    if backend not in kernels.isas():
        raise KernelError(f"no backend {backend!r}; this machine has: {', '.join(kernels.isas())}")
    return backend


# The native kernels know every format with one scale a group, and some of ggml's types. A GPU's kernels are rows more:
# ("int4", "cuda").
BACKENDS: dict[tuple[str, str], type[KernelMatrix]] = {
    (info.name, "cpu"): KernelMatrix
    for info in FORMATS.values()
    if info.scales_per_group == 1 or info.name in ("q8_0", "q6_k", "q4_k")
}
