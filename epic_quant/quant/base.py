"""`Quantizer`, what is done to a weight, and `QuantizedTensor`, what is stored of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from epic_quant.errors import QuantizationError, SpecError
from epic_quant.kernels import REFERENCE, PackedMatrix, has_kernels
from epic_quant.kernels.quantizing import Format, active, dequantize, quantize
from epic_quant.quant import gptq, hadamard
from epic_quant.quant.scheme import SCALE_DTYPE, Scheme, stored_scale

# Weights worked on at a time: temporaries of 1 MB in fp32 stay in a core's cache. Feedback multiplies matrices, and
# wants more rows at once.
_CHUNK = 2**18
_COMPENSATED_CHUNK = 2**23

# Far beyond what has a scale in fp16: so that sums in a turn do not overflow.
MAX_ROTATED = 2.0**100


@dataclass(frozen=True)
class Quantizer:
    """A scheme and its settings. `group_size` None is one scale a row; `hadamard_block` 0 is no rotation.

    Raises SpecError for settings that no spec could name.
    """

    scheme: Scheme
    group_size: int | None = None
    hadamard_block: int = 0
    gptq: bool = False

    def __post_init__(self) -> None:
        if self.scheme.scales_per_group == 0 and (self.group_size or self.hadamard_block or self.gptq):
            raise SpecError(f"{self.scheme.name} keeps the weight: it takes no group, hadamard or gptq")
        if self.group_size is not None and self.group_size < 1:
            raise SpecError(f"group size is {self.group_size}, but must be 1 or more")
        if self.hadamard_block.bit_count() > 1 or not 0 <= self.hadamard_block <= hadamard.MAX_BLOCK:
            raise SpecError(
                f"hadamard block is {self.hadamard_block}, but must be a power of two up to {hadamard.MAX_BLOCK}"
            )

    @property
    def spec(self) -> str:
        """The text that `quantizer` reads back."""
        group = "" if self.group_size is None else f"-g{self.group_size}"
        turned = f"+had{self.hadamard_block}" if self.hadamard_block else ""
        return self.scheme.name + group + turned + ("+gptq" if self.gptq else "")

    def fits(self, cols: int) -> bool:
        """Whether rows of `cols` weights fall into whole groups; a row shorter than the group is one."""
        return cols % self._group_size(cols) == 0

    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> QuantizedTensor:
        """`weight` [rows, cols], of any float dtype and finite in fp32, quantized row by row.

        `hessian` [cols, cols], fp32 or fp64, is the mean of x xᵀ over the layer's inputs x; only gptq reads it.
        A scale is fp16: it saturates at 65504, and weights too small for the least one, 2^-24, become zeros.
        Raises QuantizationError for a weight or hessian that do not fit.
        """
        if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
            raise QuantizationError(f"a {weight.dtype} tensor of shape {list(weight.shape)} is no matrix of floats")
        rows, cols = weight.shape
        used = self._for_row(cols)
        packed = torch.empty(rows, self.scheme.packing.row_nbytes(cols), dtype=torch.uint8)
        scale = torch.empty(rows, used._num_scales(cols), dtype=SCALE_DTYPE)
        native = used._native(cols)
        if native is not None and not self.gptq:
            bad = quantize(weight, native, packed, scale)
            if bad is not None:
                raise _not_finite(bad)
            return QuantizedTensor(packed, scale, cols, used)
        factor = used._inverse_cholesky_factor(hessian, cols) if self.gptq else None
        for chunk in _row_chunks(rows, cols, _COMPENSATED_CHUNK if self.gptq else _CHUNK):
            values = weight[chunk].float().contiguous()
            _check_finite(values, chunk.start)
            if used.hadamard_block:
                values = hadamard.rotate(values.clamp(-MAX_ROTATED, MAX_ROTATED), used.hadamard_block)
            codes, scale[chunk] = used._encode(values, factor)
            packed[chunk] = self.scheme.packing.pack(codes)
        return QuantizedTensor(packed, scale, cols, used)

    def _native(self, cols: int) -> Format | None:
        """How kernels know what it stores of a row; None where the reference computes."""
        if self.scheme.rule is None or not active():
            return None
        block = self.hadamard_block
        signs = hadamard.signs(cols, block) if block else None
        return Format(self.scheme.rule, self._group_size(cols), block, signs)

    def _for_row(self, cols: int) -> Quantizer:
        """Itself with the Hadamard block that fits the row; raises QuantizationError where the group does not."""
        if not self.fits(cols):
            raise QuantizationError(f"a group of {self.group_size} does not divide a row of {cols}")
        return replace(self, hadamard_block=hadamard.block_for(cols, self.hadamard_block))

    def _group_size(self, cols: int) -> int:
        return min(self.group_size or cols, cols)

    def _num_scales(self, cols: int) -> int:
        return cols // self._group_size(cols) * self.scheme.scales_per_group

    def _inverse_cholesky_factor(self, hessian: Tensor | None, cols: int) -> Tensor:
        hessian = gptq.check_hessian(hessian, cols)
        if self.hadamard_block:
            hessian = hadamard.rotate(hadamard.rotate(hessian, self.hadamard_block).T, self.hadamard_block)
        return gptq.inverse_cholesky_factor(hessian)

    def _encode(self, values: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes [rows, cols] and fp16 scales [rows, num_scales] of [rows, cols] fp32."""
        rows, cols = values.shape
        if factor is not None:
            return gptq.encode_with_compensation(values, factor, self._group_size(cols), self.scheme)
        groups = values.reshape(-1, self._group_size(cols))
        scale = self.scheme.fit(groups)
        return self.scheme.encode(groups, scale).view(rows, cols), stored_scale(scale).view(rows, -1)

    def _decode(self, packed: Tensor, scale: Tensor, cols: int) -> Tensor:
        """The inverse: [rows, cols] fp32, still turned."""
        native = self._native(cols)
        if native is not None:
            return dequantize(packed, scale, cols, native._replace(block=0), torch.float32)
        codes = self.scheme.packing.unpack(packed, cols).reshape(-1, self._group_size(cols))
        return self.scheme.decode(codes, scale.float().view(codes.shape[0], -1)).view(-1, cols)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A matrix as stored: `packed` [rows, row bytes] uint8 and `scale` [rows, scales a row] fp16.

    `quantizer` is the one that made it, with the Hadamard block that was used.
    """

    packed: Tensor
    scale: Tensor
    cols: int
    quantizer: Quantizer

    def __repr__(self) -> str:
        return f"QuantizedTensor({self.spec}, {list(self.shape)}, {self.bits_per_weight:.3f} bits a weight)"

    @property
    def spec(self) -> str:
        return self.quantizer.spec

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.cols

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return self.packed.nbytes + self.scale.nbytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, self.shape[0] * self.cols)

    def rows(self, ids: Tensor) -> QuantizedTensor:
        """Only the rows `ids` [n], integers, in that order; others are not touched. IndexError if out of range."""
        return replace(self, packed=self.packed.index_select(0, ids), scale=self.scale.index_select(0, ids))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [rows, cols]; what `dtype` cannot hold saturates."""
        native = self.quantizer._native(self.cols)
        if native is not None:
            return dequantize(self.packed, self.scale, self.cols, native, dtype)
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        decoded = torch.empty(self.shape, dtype=dtype)
        for chunk, values in self._decoded_chunks():
            if self.quantizer.hadamard_block:
                values = hadamard.unrotate(values, self.quantizer.hadamard_block)
            decoded[chunk] = values.clamp_(-limit, limit)
        return decoded

    def matmul(self, x: Tensor, activations: str = "fp32") -> Tensor:
        """`x` [..., cols] times the transposed matrix: [..., rows] in x's dtype. It turns x, never the matrix back.

        From the packed bytes where there is a kernel, which `computed_by` tells; fp64, empty ones and gradients are
        for the reference, which knows no int8 activations.
        """
        if self.quantizer.hadamard_block:
            x = hadamard.rotate(x, self.quantizer.hadamard_block)
        kernel = self._kernel
        if kernel is not None and x.numel() and x.dtype is not torch.float64 and not x.requires_grad:
            return kernel.linear(x, activations)
        return torch.cat(
            [torch.nn.functional.linear(x, values.to(x.dtype)) for _, values in self._decoded_chunks()], -1
        )

    def computed_by(self, activations: str = "fp32") -> str:
        """What multiplies by it, and the form of activations that it then takes, such as `avx2, int8 activations`."""
        return REFERENCE if self._kernel is None else f"{self._kernel.isa}, {activations} activations"

    @cached_property
    def _kernel(self) -> PackedMatrix | None:
        scheme = self.quantizer.scheme
        coding = scheme.packing.coding
        if scheme.levels is None or not has_kernels(coding) or not self.shape[0]:
            return None
        return PackedMatrix(self.packed.contiguous(), self.scale.contiguous(), self.cols, coding, scheme.levels)

    def _decoded_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for chunk in _row_chunks(*self.shape, _CHUNK):
            yield chunk, self.quantizer._decode(self.packed[chunk], self.scale[chunk], self.cols)


def _row_chunks(rows: int, cols: int, numel: int) -> Iterator[slice]:
    """Slices of rows that hold about `numel` weights each."""
    step = max(1, numel // cols)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _check_finite(values: Tensor, first_row: int) -> None:
    """Raises QuantizationError that names the first row with NaN or infinity."""
    bad = ~torch.linalg.vector_norm(values, ord=float("inf"), dim=1).isfinite()
    if bad.any():
        raise _not_finite(first_row + int(bad.nonzero()[0]))


def _not_finite(row: int) -> QuantizationError:
    return QuantizationError(f"NaN or infinity in row {row}")
