"""Formats of codes and fp16 scales for groups of them, of rows that may be rotated first; and the scalar ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from epic_quant.errors import QuantizationError
from epic_quant.quant import backends, gptq, hadamard
from epic_quant.quant.backends import KernelMatrix, Rotation, Rule
from epic_quant.quant.bitpack import Packing
from epic_quant.quant.formats import Format, check_finite, format_named
from epic_quant.quant.gptq import Hessian
from epic_quant.quant.scales import SCALE_DTYPE, stored_scale
from epic_quant.quant.stored import StoredMatrix, bits_per_weight, joined_rows, product_of_rows, row_chunks
from epic_quant.spec import WeightSpec

# Weights worked on at a time: temporaries of 1 MB in fp32 stay in a core's cache. Error compensation takes a column
# of so many rows at once, which outweighs what starting an operation takes.
_CHUNK = 2**18
_COMPENSATED_ROWS = 2560

# Far beyond what has a scale in fp16: so that sums in a rotation do not overflow.
MAX_ROTATED = 2.0**100


@dataclass(frozen=True)
class ScaledFormat(Format):
    """How the weights of a row become bytes and fp16 scales, and back."""

    name: str

    @cached_property
    def rule(self) -> Rule | None:
        """The format in the terms of the native kernels; None where they do not have it."""
        return None

    def with_options(self, spec: WeightSpec) -> ScaledFormat:
        """The format as the spec's options of its own, such as state bits, make it."""
        return self

    @abstractmethod
    def encode_rows(
        self, values: Tensor, group_size: int, factor: Tensor | None, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        """Packed bytes [rows, row bytes] and scales [rows, scales a row], fp16, of `values` [rows, cols] fp32.

        `factor` is the Hessian's, as `Hessian.factor`, where errors are compensated.
        """

    @abstractmethod
    def unpack(self, packed: Tensor, cols: int) -> Tensor:
        """The codes [rows, cols] uint8 of packed rows [rows, row bytes]."""

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The values that codes stand for: [n, size] uint8 to [n, size] fp32. A zero scale gives zeros."""

    @abstractmethod
    def row_nbytes(self, cols: int) -> int:
        """Bytes of a packed row."""

    def quantize(
        self, weight: Tensor, spec: WeightSpec, hessian: Tensor | Hessian | None = None, backend: str | None = None
    ) -> GroupedMatrix:
        """As `quant.quantize`. A scale saturates at 65504, and weights too small for the least one become zeros."""
        rows, cols = weight.shape
        spec = resolved(spec, cols)
        own = self.with_options(spec)
        kernels = None if spec.compensated else backends.kernels_for(self.name, weight.device, backend)
        if kernels is not None and own.rule is not None and own.rule.has_quantizer:
            made = kernels.quantize(own.rule, weight, spec.group_of(cols), _rotation(spec, cols), backend)
            return GroupedMatrix(made.packed, made.scale, cols, spec, backend)
        (_, packed_shape), (_, scale_shape) = self.layout(spec, (rows, cols)).values()
        packed = torch.empty(packed_shape, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(scale_shape, dtype=SCALE_DTYPE, device=weight.device)
        given = Hessian.given(hessian, "yaqa" if spec.yaqa else "gptq") if spec.compensated else None
        factor = None if given is None else given.factor(cols, spec.hadamard_block)
        rows_of = given.row_compensation(rows, cols) if given is not None and spec.yaqa else None
        group = spec.group_of(cols)
        chunks = row_chunks(rows, cols, _CHUNK if factor is None else _COMPENSATED_ROWS * cols)
        for chunk in chunks if rows_of is None else rows_of:
            values = weight[chunk].float().contiguous()
            check_finite(values, chunk)
            if spec.hadamard_block:
                values = hadamard.rotate(values.clamp(-MAX_ROTATED, MAX_ROTATED), spec.hadamard_block, backend)
            target = values if rows_of is None else values + rows_of.compensation
            packed[chunk], scale[chunk] = own.encode_rows(target, group, factor, backend)
            if rows_of is not None:
                rows_of.learn(own.decoded(own.unpack(packed[chunk], cols), scale[chunk], group) - values)
        if given is not None and rows_of is not None and isinstance(own, GroupedFormat):
            inputs = given.rotated(cols, spec.hadamard_block).float()
            for some in (some for _ in range(gptq.SWEEPS) for some in rows_of):
                codes = own.unpack(packed[some], cols)
                before = own.decoded(codes, scale[some], group)
                again = gptq.encode_again(codes, before, scale[some], inputs, *rows_of.pull(), group, own)
                rows_of.learn(rows_of.errors + own.decoded(again, scale[some], group) - before)
                packed[some] = own.packing.pack(again)
        return GroupedMatrix(packed, scale, cols, spec, backend)

    def decoded(self, codes: Tensor, scale: Tensor, group_size: int) -> Tensor:
        """Rows [n, cols], fp32 and still rotated, of their codes and scales as they are stored, [n, scales a row]."""
        groups = codes.reshape(-1, group_size)
        return self.decode(groups, scale.float().view(len(groups), -1)).view(codes.shape)

    def from_tensors(
        self, spec: WeightSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int], backend: str | None = None
    ) -> StoredMatrix:
        return GroupedMatrix(tensors["packed"], tensors["scale"], shape[1], resolved(spec, shape[1]), backend)

    def layout(self, spec: WeightSpec, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        rows, cols = shape
        scales = cols // resolved(spec, cols).group_of(cols) * spec.info.scales_per_group
        return {
            "packed": (torch.uint8, (rows, self.row_nbytes(cols))),
            "scale": (SCALE_DTYPE, (rows, scales)),
        }


@dataclass(frozen=True)
class GroupedFormat(ScaledFormat):
    """A scalar format: how the weights of a group become codes, one for each, and back.

    Its methods see groups as [n, size], fp32, and know nothing of rows, packing, rotation or error compensation.
    """

    packing: Packing

    @abstractmethod
    def fit(self, groups: Tensor) -> Tensor:
        """The scales of each group: [n, size] fp32 to [n, scales a group] fp32."""

    @abstractmethod
    def encode(self, groups: Tensor, scale: Tensor) -> Tensor:
        """Codes of the nearest values under that scale: [n, size] fp32 to [n, size] uint8."""

    def encode_rows(
        self, values: Tensor, group_size: int, factor: Tensor | None, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        if factor is None:
            groups = values.reshape(-1, group_size)
            fitted = self.fit(groups)
            codes = self.encode(groups, fitted).view(values.shape)
            scale = stored_scale(fitted).view(len(values), -1)
        else:
            codes, scale = gptq.encode(values, factor, group_size, self, partial(self.stored_fit, backend=backend))
        return self.packing.pack(codes), scale

    def unpack(self, packed: Tensor, cols: int) -> Tensor:
        return self.packing.unpack(packed, cols)

    def row_nbytes(self, cols: int) -> int:
        return self.packing.row_nbytes(cols)

    def stored_fit(self, groups: Tensor, backend: str | None) -> Tensor:
        """The scales as they are stored, fp16: of [n, size] fp32, by a kernel where there is one."""
        kernels = backends.kernels_for(self.name, groups.device, backend)
        if kernels is None or self.rule is None:
            return stored_scale(self.fit(groups))
        return kernels.quantize(self.rule, groups, groups.shape[1], isa=backend).scale


@dataclass(frozen=True, eq=False, repr=False)
class GroupedMatrix:
    """`packed` [rows, row bytes] uint8, codes, and `scale` [rows, scales a row] fp16.

    `spec` has the Hadamard block that was used. `backend` names what computes; None is `backends.default()`.
    """

    packed: Tensor
    scale: Tensor
    cols: int
    spec: WeightSpec
    backend: str | None = None

    def __repr__(self) -> str:
        return f"GroupedMatrix({self.spec}, {list(self.shape)}, {self.bits_per_weight:.3f} bits a weight)"

    def __reduce__(self) -> tuple[type[GroupedMatrix], tuple[object, ...]]:
        return GroupedMatrix, (self.packed, self.scale, self.cols, self.spec, self.backend)

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.cols

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(self)

    def rows(self, ids: Tensor) -> GroupedMatrix:
        return replace(self, packed=self.packed.index_select(0, ids), scale=self.scale.index_select(0, ids))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self._kernels is not None:
            return self._kernels.dequantize(dtype)
        chunks = self._decoded_chunks()
        if block := self.spec.hadamard_block:
            chunks = ((rows, hadamard.unrotate(values, block, self.backend)) for rows, values in chunks)
        return joined_rows(chunks, self, dtype)

    def matmul(self, x: Tensor, activations: str = "fp32") -> Tensor:
        """As `StoredMatrix.matmul`, by a kernel where there is one; it rotates x, never the matrix back."""
        product = backends.product(self._kernels, x, activations)
        if product is not None:
            return product
        if self.spec.hadamard_block:
            x = hadamard.rotate(x, self.spec.hadamard_block, self.backend)
        return product_of_rows(x, self._decoded_chunks(), self.shape[0])

    def computed_by(self, activations: str = "fp32") -> str:
        return backends.computed_by(self._kernels, activations)

    def tensors(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "scale": self.scale}

    @cached_property
    def _format(self) -> ScaledFormat:
        found = format_named(self.spec.format)
        assert isinstance(found, ScaledFormat)
        return found.with_options(self.spec)

    @cached_property
    def _kernels(self) -> KernelMatrix | None:
        """Itself with the kernels that serve it; None where the reference computes."""
        kernels, rule = backends.kernels_for(self.spec.format, self.packed.device, self.backend), self._format.rule
        if kernels is None or rule is None:
            return None
        return kernels(rule, self.packed, self.scale, self.cols, _rotation(self.spec, self.cols), self.backend)

    def _decoded_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """The matrix, fp32, some rows at a time, and still rotated."""
        for chunk in row_chunks(*self.shape, _CHUNK):
            packed, scale = self.packed[chunk], self.scale[chunk]
            kernels = None if self._kernels is None else replace(self, packed=packed, scale=scale)._kernels
            if kernels is not None:
                yield chunk, kernels.dequantize(torch.float32, rotated=True)
                continue
            codes = self._format.unpack(packed, self.cols)
            yield chunk, self._format.decoded(codes, scale, self.spec.group_of(self.cols))


def resolved(spec: WeightSpec, cols: int) -> WeightSpec:
    """The spec with the Hadamard block that fits rows of `cols`. Raises QuantizationError where the group does not."""
    if misfit := spec.misfit(cols):
        raise QuantizationError(misfit)
    block = hadamard.block_for(cols, spec.hadamard_block)
    return spec if block == spec.hadamard_block else replace(spec, hadamard_block=block)


def _rotation(spec: WeightSpec, cols: int) -> Rotation | None:
    block = spec.hadamard_block
    return hadamard.rotation(cols, block) if block else None
