"""The types: a row for each, and the matrix that holds its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from epic_quant.errors import QuantizationError
from epic_quant.quant import backends
from epic_quant.quant.backends import KernelMatrix, Rule
from epic_quant.quant.formats import Format, check_finite, format_named
from epic_quant.quant.ggml.fitting import Levels, fit_scales, fit_scales_and_minima
from epic_quant.quant.ggml.layout import Bits, EightPairs, Field, Joined, Signed, Trits, read_fp16, write_fp16
from epic_quant.quant.gptq import Hessian
from epic_quant.quant.grouped import GroupedFormat
from epic_quant.quant.scales import SCALE_DTYPE
from epic_quant.quant.stored import StoredMatrix, bits_per_weight, joined_rows, product_of_rows, row_chunks
from epic_quant.spec import FORMATS as SPEC_FORMATS
from epic_quant.spec import FormatInfo, WeightSpec

# Weights worked on at a time: temporaries of 1 MB in fp32 stay in a core's cache.
_CHUNK = 2**18
# Added to every column's importance, of its mean: the same as error compensation adds to a Hessian.
_DAMPING = 0.01


class Groups(NamedTuple):
    """Groups of a block that have scales of their own: whole multiples of the block's.

    `field` holds them less the least, and after them those of the minima, where the byte `min_at` has their fp16 scale.
    """

    number: int
    multiples: range
    field: Field
    min_at: int | None = None


@dataclass(frozen=True)
class BlockFormat(Format):
    """A ggml type: what its codes are, where a block has them, and where its fp16 scale."""

    name: str
    levels: Levels
    codes: Field
    scale_at: int
    groups: Groups | None = None

    @property
    def info(self) -> FormatInfo:
        """The format's row in the table, which has the size of a block."""
        return SPEC_FORMATS[self.name]

    def quantize(
        self, weight: Tensor, spec: WeightSpec, hessian: Tensor | Hessian | None = None, backend: str | None = None
    ) -> BlockMatrix:
        """As `quant.quantize`. Scales saturate at 65504, and weights too small for the least one become zeros."""
        rows, cols = weight.shape
        ((dtype, size),) = self.layout(spec, (rows, cols)).values()
        blocks = torch.empty(size, dtype=dtype, device=weight.device)
        importance = Hessian.given(hessian, "imatrix").diagonal(cols) if spec.imatrix else None
        for chunk in row_chunks(rows, cols, _CHUNK):
            values = weight[chunk].float()
            check_finite(values, chunk)
            blocks[chunk] = self.encode(values, importance)
        return BlockMatrix(blocks, spec, backend)

    def from_tensors(
        self, spec: WeightSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int], backend: str | None = None
    ) -> StoredMatrix:
        return BlockMatrix(tensors["blocks"], spec, backend)

    def layout(self, spec: WeightSpec, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        rows, cols = shape
        if misfit := spec.misfit(cols):
            raise QuantizationError(f"{spec}: {misfit}")
        return {"blocks": (torch.uint8, (rows, cols // self.info.block_size * self.info.block_nbytes))}

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """Rows [rows, cols] of whole blocks of finite fp32 weights, to uint8 [rows, row bytes].

        `importance` [cols], at least 0, is how much a squared error counts in each column: the mean of the squared
        inputs, a Hessian's diagonal. QuantizationError where it is something else. No block's error is larger by it
        than without: the search finds no more than a near optimum, so both are tried.
        """
        plain = self._encode(weight, None)
        if importance is None:
            return plain
        importance = _relative(importance, weight.shape[1]).to(weight.device)
        fitted = self._encode(weight, importance + _DAMPING)

        def errors(blocks: Tensor) -> Tensor:
            """Of each block, [n, 1]."""
            squares = (self.decode(blocks) - weight).square_() * importance
            return squares.view(-1, self.info.block_size).sum(1, keepdim=True)

        better = errors(fitted) < errors(plain)
        chosen = torch.where(better, fitted.view(len(better), -1), plain.view(len(better), -1))
        return chosen.view(plain.shape)

    def _encode(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        count, multiples = (1, range(1, 2)) if self.groups is None else self.groups[:2]
        group = self.info.block_size // count

        def grouped(rows: Tensor) -> Tensor:
            """[rows, cols] to [size, groups, n]."""
            return rows.reshape(-1, count, group).permute(2, 1, 0).contiguous()

        x = grouped(weight)
        weights = None if importance is None else grouped(importance.expand(weight.shape))
        has_minima = self.groups is not None and self.groups.min_at is not None
        fitted = (fit_scales_and_minima if has_minima else fit_scales)(x, weights, self.levels, multiples)
        blocks = self.join(self.levels.encode(fitted.levels).permute(2, 1, 0).flatten(1), fitted.scale)
        if self.groups is not None:
            numbers = fitted.multiples - multiples[0]
            if self.groups.min_at is not None:
                numbers = torch.cat([numbers, fitted.min_multiples])
                write_fp16(blocks, self.groups.min_at, fitted.min_scale)
            self.groups.field.write(blocks, numbers.T.to(torch.uint8))
        return blocks.view(len(weight), -1)

    def join(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Blocks [n, block bytes] of their codes [n, weights] uint8 and fp16 scales [n]; the rest of them is zero."""
        blocks = torch.zeros(len(codes), self.info.block_nbytes, dtype=torch.uint8, device=codes.device)
        self.codes.write(blocks, codes)
        write_fp16(blocks, self.scale_at, scale)
        return blocks

    def decode(self, blocks: Tensor) -> Tensor:
        """Rows of blocks, uint8 [rows, row bytes], to fp32 [rows, cols], rounded as ggml's own decoder rounds."""
        rows, blocks = len(blocks), blocks.reshape(-1, self.info.block_nbytes)
        values: Tensor = self.levels.decode(self.codes.read(blocks))
        scale = read_fp16(blocks, self.scale_at)
        if self.groups is None:
            return values.mul_(scale).view(rows, -1)
        numbers = self.groups.field.read(blocks).float()
        multiples, min_multiples = numbers[:, : self.groups.number], numbers[:, self.groups.number :]
        values = values.unflatten(1, (self.groups.number, -1))
        values.mul_((scale * (multiples + self.groups.multiples[0])).unsqueeze(2))
        if self.groups.min_at is not None:
            values.sub_((read_fp16(blocks, self.groups.min_at) * min_multiples).unsqueeze(2))
        return values.view(rows, -1)


def _relative(importance: Tensor, cols: int) -> Tensor:
    """Over the mean, [cols] fp32."""
    if importance.shape != (cols,) or not importance.isfinite().all() or (importance < 0).any():
        raise QuantizationError(f"the importance of columns is no {cols} finite numbers that are at least 0")
    importance = importance.double()
    return (importance / (importance.mean().item() or 1.0)).float()


@dataclass(frozen=True, eq=False, repr=False)
class BlockMatrix:
    """`blocks` [rows, row bytes] uint8, as a GGUF file has them; kernels read them so.

    `backend` names what computes; None is `backends.default()`.
    """

    blocks: Tensor
    spec: WeightSpec
    backend: str | None = None

    def __repr__(self) -> str:
        return f"BlockMatrix({self.spec}, {list(self.shape)}, {self.bits_per_weight:.3f} bits a weight)"

    def __reduce__(self) -> tuple[type[BlockMatrix], tuple[object, ...]]:
        return BlockMatrix, (self.blocks, self.spec, self.backend)

    @property
    def shape(self) -> tuple[int, int]:
        rows, nbytes = self.blocks.shape
        return rows, nbytes // self.spec.info.block_nbytes * self.spec.info.block_size

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(self)

    def rows(self, ids: Tensor) -> BlockMatrix:
        return replace(self, blocks=self.blocks.index_select(0, ids))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self._kernels is not None:
            return self._kernels.dequantize(dtype)
        return joined_rows(self._decoded_chunks(), self, dtype)

    def matmul(self, x: Tensor, activations: str = "fp32") -> Tensor:
        """As `StoredMatrix.matmul`, by a kernel where there is one; else rows are decoded some at a time."""
        product = backends.product(self._kernels, x, activations)
        if product is not None:
            return product
        return product_of_rows(x, self._decoded_chunks(), self.shape[0])

    def computed_by(self, activations: str = "fp32") -> str:
        return backends.computed_by(self._kernels, activations)

    def tensors(self) -> dict[str, Tensor]:
        return {"blocks": self.blocks}

    @cached_property
    def _kernels(self) -> KernelMatrix | None:
        """Itself with the kernels that serve it; None where the reference computes."""
        kernels = backends.kernels_for(self.spec.format, self.blocks.device, self.backend)
        if kernels is None:
            return None
        no_scales = torch.empty(self.shape[0], 0, dtype=SCALE_DTYPE)
        rule = Rule(self.spec.format, self._format.levels.values)
        return kernels(rule, self.blocks, no_scales, self.shape[1], isa=self.backend)

    @property
    def _format(self) -> BlockFormat:
        found = format_named(self.spec.format)
        assert isinstance(found, BlockFormat)
        return found

    def _decoded_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in row_chunks(*self.shape, _CHUNK):
            yield rows, self._format.decode(self.blocks[rows])


def as_blocks(matrix: StoredMatrix) -> Tensor:
    """The blocks [rows, row bytes] of a matrix whose spec has a `ggml_type`, with the same values bit for bit."""
    tensors = matrix.tensors()
    if "blocks" in tensors:
        return tensors["blocks"]
    assert matrix.spec.ggml_type is not None
    source, target = format_named(matrix.spec.format), format_named(matrix.spec.ggml_type)
    assert isinstance(source, GroupedFormat)
    assert isinstance(target, BlockFormat)
    rows, cols = matrix.shape
    # Both count levels from the least.
    codes = source.packing.unpack(tensors["packed"], cols).reshape(-1, target.info.block_size)
    return target.join(codes, tensors["scale"].flatten()).view(rows, -1)


def _signed(bits: int) -> Levels:
    return Levels(tuple(range(-(1 << bits - 1), 1 << bits - 1)))


def _unsigned(bits: int) -> Levels:
    return Levels(tuple(range(1 << bits)))


_TERNARY = Levels((-1, 0, 1))
_NON_LINEAR = Levels((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))

_SCALES_AND_MINIMA = Groups(8, range(64), EightPairs(4), min_at=2)

FORMATS = (
    BlockFormat("q8_0", _signed(8), Signed(Bits(2, 32, 8, 32)), scale_at=0),
    BlockFormat("q5_0", _signed(5), Joined((Bits(6, 16, 4, 16), Bits(2, 4, 1, 1, place=4))), scale_at=0),
    BlockFormat("q4_0", _signed(4), Bits(2, 16, 4, 16), scale_at=0),
    BlockFormat("iq4_nl", _NON_LINEAR, Bits(2, 16, 4, 16), scale_at=0),
    BlockFormat("tq1_0", _TERNARY, Trits(), scale_at=52),
    BlockFormat("tq2_0", _TERNARY, Bits(0, 64, 2, 32), scale_at=64),
    BlockFormat(
        "q6_k",
        _signed(6),
        Joined((Bits(0, 128, 4, 64), Bits(128, 64, 2, 32, place=4))),
        scale_at=208,
        groups=Groups(16, range(-128, 128), Signed(Bits(192, 16, 8, 16))),
    ),
    BlockFormat(
        "q5_k",
        _unsigned(5),
        Joined((Bits(48, 128, 4, 32), Bits(16, 32, 1, 32, place=4))),
        scale_at=0,
        groups=_SCALES_AND_MINIMA,
    ),
    BlockFormat("q4_k", _unsigned(4), Bits(16, 128, 4, 32), scale_at=0, groups=_SCALES_AND_MINIMA),
    BlockFormat(
        "q3_k",
        _signed(3),
        Joined((Bits(32, 64, 2, 32), Bits(0, 32, 1, 32, place=2))),
        scale_at=108,
        groups=Groups(16, range(-32, 32), Joined((Bits(96, 8, 4, 8), Bits(104, 4, 2, 4, place=4)))),
    ),
    BlockFormat(
        "q2_k",
        _unsigned(2),
        Bits(16, 64, 2, 32),
        scale_at=80,
        groups=Groups(16, range(16), Bits(0, 16, 4, 16), min_at=82),
    ),
)
