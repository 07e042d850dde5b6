"""A matrix as stored, in C++: quantized, multiplied by and decoded. `epic_quant.quant` has the reference.

What is stored of a row is packed codes and fp16 scales, one for every group of columns; or blocks that hold both, as
ggml's types are. A new coding is a row of `kCodings` in src/format.h and a specialization of `Codes` in src/codes.h; no
Python here names one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epic_quant import kernels
from epic_quant.errors import KernelError, QuantizationError, unknown

# The numbers of `enum class Element` and `enum class Rounding` in src/format.h.
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# `kOwnErrors` in src/survivors.h.
_OWN_ERRORS = 32
_ROUNDINGS = {"nearest": 0, "sign": 1, "table": 2}


@dataclass(frozen=True)
class Format:
    """The meaning of codes, and how quantizing chooses them and their scales.

    `coding` says how codes lie in a row's bytes: "bits1" to "bits8", the lowest bit first, across byte borders, or
    "trits", five base-3 digits a byte, the first as the lowest; or it is a type of ggml, by its name. Codes from 0 on
    stand for `levels`, ascending whole numbers in [-128, 127], in units of the scale. A ratio of weight and scale is
    rounded to the "nearest" of evenly spaced levels, to its "sign" where its magnitude is above 0.33, or to the nearest
    level of a "table" of 4, 8 or 16.

    The scale is a group's largest magnitude over `divisor`. Where that is 0, it is the one of least squared error,
    searched from the best one for Gaussian weights, whose levels are `gaussian_step` standard deviations apart, to the
    one that puts the largest magnitude on `peak_level`; negative, with `either_sign`, where the largest weight is
    positive.

    A trellis, "trellis1" to "trellis4", has codes that overlap: weight i of a row is the value of a state of
    `state_bits` bits, those from bit i times the coding's bits on. With p the lower 16 bits of the state's product with
    `multiplier`, that is levels[p >> 12] + levels[16 + (p >> 8 & 15)]: 16 levels for the upper half of an index, and 16
    for the lower. Whole pieces of 128 weights lie as [bits, 8] words of 16 bits, eight streams of 16 weights side by
    side, the rest of a row in order.
    """

    coding: str
    levels: tuple[int, ...]
    rounding: str = "nearest"
    divisor: float = 0.0
    gaussian_step: float = 0.0
    peak_level: int = 0
    either_sign: bool = False
    state_bits: int = 0
    multiplier: int = 0

    @property
    def has_quantizer(self) -> bool:
        """Whether `NativeMatrix.quantize` makes it: a trellis takes a search for paths."""
        return not self.state_bits


class Rotation(NamedTuple):
    """Rows times `signs` [cols], fp32, and then Sylvester's Hadamard matrix in every `block`.

    The signs are ±1 over the block's root, so that norms are kept. Raises KernelError, where it is used, for a block
    that is no power of two or does not divide the row, and for signs that do not fit.
    """

    block: int
    signs: Tensor


class NativeMatrix:
    """A matrix [rows, cols] as stored, with the kernels that serve it chosen.

    `packed` [rows, row bytes] uint8 and `scale` [rows, a divisor of cols] fp16, or [rows, 0] where `packed` are blocks
    that hold scales, are kept, or copied where they are not contiguous and aligned. What is stored of a row may be that
    of the row rotated. `isa` is the instruction set, by default the one that this process computes with. Raises
    KernelError for buffers that do not fit, a format that no kernel knows, and an instruction set that has no kernels
    here.
    """

    def __init__(
        self,
        format: Format,
        packed: Tensor,
        scale: Tensor,
        cols: int,
        rotation: Rotation | None = None,
        isa: str | None = None,
    ) -> None:
        self.isa = isa or kernels.isa()
        self._format = format
        self._rotation = rotation
        native = _native_format(format)
        if packed.dim() != 2 or packed.dtype != torch.uint8 or cols < 1 or packed.shape[1] != native.row_nbytes(cols):
            wanted = f"{torch.uint8} [rows, {native.row_nbytes(max(cols, 0))}] for {cols} columns, 1 or more"
            raise KernelError(f"packed is {packed.dtype} {list(packed.shape)}, expected {wanted}")
        rows = packed.shape[0]
        if scale.dim() != 2 or scale.dtype != torch.float16 or scale.shape[0] != rows:
            wanted = f"{torch.float16} [{rows}, a divisor of {cols}]"
            raise KernelError(f"scale is {scale.dtype} {list(scale.shape)}, expected {wanted}")
        num_scales = scale.shape[1]
        if native.block_cols:
            if num_scales or cols % native.block_cols:
                wanted = f"none beside blocks of {native.block_cols}"
                raise KernelError(f"{num_scales} scales a row for rows of {cols} in {format.coding}, expected {wanted}")
            num_scales = cols // native.group_cols
        elif not num_scales or cols % num_scales:
            raise KernelError(f"{num_scales} scales a row do not divide rows of {cols}")
        if rotation is not None:
            _check_rotation(rotation, cols)
        self.shape = rows, cols
        self.packed, self.scale = _in_memory(packed), _in_memory(scale)
        try:
            self._native: Any = _native().Matrix(
                self.isa,
                native,
                rotation.block if rotation else 0,
                rotation.signs.data_ptr() if rotation else 0,
                rows,
                cols,
                num_scales,
                self.packed.data_ptr(),
                self.scale.data_ptr(),
            )
        except ValueError as error:
            raise KernelError(f"{error}; this machine has: {', '.join(kernels.isas())}") from None

    @classmethod
    def quantize(
        cls,
        format: Format,
        weight: Tensor,
        group_size: int,
        rotation: Rotation | None = None,
        isa: str | None = None,
    ) -> NativeMatrix:
        """`weight` [rows, cols] floats as stored, with a scale for every `group_size` columns.

        Raises QuantizationError where a number is not finite, which names the first such row, and KernelError where
        the group does not divide the row, for blocks, and as the constructor does.
        """
        if _native_format(format).block_cols or not format.has_quantizer:
            raise KernelError(f"no kernel quantizes to {format.coding}")
        rows, cols = weight.shape
        if group_size < 1 or cols % group_size:
            raise KernelError(f"a group of {group_size} does not divide rows of {cols}")
        packed = torch.empty(rows, _native_format(format).row_nbytes(cols), dtype=torch.uint8)
        scale = torch.empty(rows, cols // group_size, dtype=torch.float16)
        matrix = cls(format, packed, scale, cols, rotation, isa)
        weight = _in_memory(weight if weight.dtype in _ELEMENTS else weight.float())
        bad = matrix._native.quantize(_ELEMENTS[weight.dtype], weight.data_ptr(), torch.get_num_threads())
        if bad >= 0:
            raise QuantizationError(f"NaN or infinity in row {bad}")
        return matrix

    def dequantize(self, dtype: torch.dtype = torch.float32, *, rotated: bool = False) -> Tensor:
        """The matrix [rows, cols]; what `dtype` cannot hold saturates. `rotated` leaves rows as they are stored."""
        decoded = torch.empty(self.shape, dtype=dtype if dtype in _ELEMENTS else torch.float32)
        element = _ELEMENTS[decoded.dtype]
        self._native.dequantize(element, decoded.data_ptr(), rotated, torch.get_num_threads())
        return decoded.to(dtype)

    @property
    def has_matmul(self) -> bool:
        """Whether there are kernels that multiply by codes of this coding."""
        found: bool = self._native.has_matmul
        return found

    def matmul(self, x: Tensor, activations: str = "fp32") -> Tensor:
        """`x` [..., cols], any float dtype but computed in fp32, times the transpose: [..., rows] in x's dtype.

        x is rotated as the rows are. Activations "fp32" are exact to fp32's rounding; "int8" rounds them to 8 bits with
        a scale for a block of at most 320 in a row. A row of x with NaN or infinity may give NaN where infinity would
        be right. Raises KernelError for a coding without kernels, other activations, no tokens, other inner dims, or
        what is no float tensor in memory.
        """
        if not self.has_matmul:
            raise KernelError(f"no kernel multiplies by codes as {self._format.coding}")
        if activations not in kernels.ACTIVATIONS:
            raise KernelError(unknown("activations", activations, kernels.ACTIVATIONS))
        rows, cols = self.shape
        if x.layout is not torch.strided or x.device.type != "cpu" or not x.is_floating_point():
            raise KernelError(f"x is {x.dtype} on {x.device}, expected floats in memory")
        if x.dim() == 0 or x.shape[-1] != cols:
            raise KernelError(f"x is {list(x.shape)}, expected [..., {cols}]")
        tokens = x.numel() // cols
        if not tokens:
            raise KernelError(f"x is {list(x.shape)}: no tokens")
        values = _in_memory(x.detach().float())
        out = torch.empty(*x.shape[:-1], rows)
        self._native.matmul(values.data_ptr(), tokens, out.data_ptr(), activations == "int8", torch.get_num_threads())
        return out.to(x.dtype)

    def __reduce__(self) -> tuple[type[NativeMatrix], tuple[Any, ...]]:
        return NativeMatrix, (self._format, self.packed, self.scale, self.shape[1], self._rotation, self.isa)


def find_compensated_paths(
    x: Tensor,
    scales: Tensor,
    factor: Tensor,
    values: Tensor,
    bits: int,
    before: Tensor,
    keep: int,
    most: int,
    *,
    ends: bool,
    isa: str | None = None,
) -> Tensor:
    """The states [rows, keep], int32, of paths through x [rows, cols] fp32 whose errors later columns compensate.

    As `epic_quant.quant.trellis.find_compensated_paths`, whose other arguments these are; `isa` as in `NativeMatrix`.
    Raises KernelError for what does not fit.
    """
    rows, cols = x.shape
    state_bits = _checked_search(x, values, bits, before, keep)
    if scales.shape != x.shape or factor.shape != (cols, cols):
        raise KernelError(f"scales {list(scales.shape)} and a factor {list(factor.shape)} for rows {list(x.shape)}")
    if {one.dtype for one in (x, scales, factor, values)} != {torch.float32} or not 1 <= most <= 2**15:
        raise KernelError(f"rows and what goes with them are not all {torch.float32}, or {most} paths survive")
    x, scales, factor, values, before = map(_in_memory, (x, scales, factor, values, before.int()))
    own, over_diagonal = own_factors(factor), 1 / factor.diagonal()
    states = torch.empty(rows, keep, dtype=torch.int16)
    _native().find_compensated_paths(
        isa or kernels.isa(),
        bits,
        state_bits,
        values.data_ptr(),
        x.data_ptr(),
        scales.data_ptr(),
        rows,
        cols,
        factor.data_ptr(),
        own.data_ptr(),
        over_diagonal.data_ptr(),
        before.data_ptr(),
        ends,
        most,
        keep,
        states.data_ptr(),
        torch.get_num_threads(),
    )
    return states.int() & 0xFFFF


def own_factors(factor: Tensor) -> Tensor:
    """What errors of the columns before take of each column, [cols, 32]: that of column i at i modulo 32.

    Of column j it is factor[i, j] for the 31 before it, and 0 at its own place and before the first.
    """
    own = torch.zeros(len(factor), _OWN_ERRORS)
    for apart in range(1, min(_OWN_ERRORS, len(factor))):
        columns = torch.arange(apart, len(factor))
        own[columns, (columns - apart) % _OWN_ERRORS] = factor.diagonal(apart)
    return own


def _checked_search(x: Tensor, values: Tensor, bits: int, before: Tensor, keep: int) -> int:
    """The state bits of a trellis with these values; raises KernelError where no kernel has it, or rows do not fit."""
    state_bits = values.numel().bit_length() - 1
    if not 1 <= bits <= 4 or values.shape != (1 << state_bits,) or not bits + 5 <= state_bits <= 16:
        raise KernelError(
            f"values {list(values.shape)} for {bits} bits, expected 1 to 4 bits, and 2^(bits + 5) to 2^16"
        )
    rows, cols = x.shape
    if not 1 <= keep <= cols or before.shape != (rows,):
        raise KernelError(
            f"{keep} of {cols} columns after states {list(before.shape)}, expected 1 or more and [{rows}]"
        )
    return state_bits


def find_paths(
    x: Tensor, values: Tensor, bits: int, before: Tensor, keep: int, *, ends: bool, isa: str | None = None
) -> Tensor:
    """The states [rows, keep], int32, that a path nearest to x [rows, cols] int16 begins with.

    As `epic_quant.quant.trellis.find_paths`, whose other arguments these are; `isa` as in `NativeMatrix`. Raises
    KernelError for what does not fit.
    """
    rows, cols = x.shape
    state_bits = _checked_search(x, values, bits, before, keep)
    if x.dtype != torch.int16 or values.dtype != torch.int16:
        raise KernelError(f"rows and values are {x.dtype} and {values.dtype}, expected {torch.int16}")
    x, values, before = _in_memory(x), _in_memory(values), _in_memory(before.int())
    states = torch.empty(rows, keep, dtype=torch.int16)
    _native().find_paths(
        isa or kernels.isa(),
        bits,
        state_bits,
        values.data_ptr(),
        x.data_ptr(),
        rows,
        cols,
        before.data_ptr(),
        ends,
        keep,
        states.data_ptr(),
        torch.get_num_threads(),
    )
    return states.int() & 0xFFFF


def rotate(x: Tensor, rotation: Rotation, *, inverse: bool = False, isa: str | None = None) -> Tensor:
    """Rows of x [..., cols], fp32, rotated, or rotated back; `isa` as in `NativeMatrix`.

    Raises KernelError for what does not fit.
    """
    cols = x.shape[-1]
    _check_rotation(rotation, cols)
    if x.dtype != torch.float32:
        raise KernelError(f"rows to rotate are {x.dtype}, expected {torch.float32}")
    x = _in_memory(x)
    rotated = torch.empty_like(x)
    block, signs = rotation.block, rotation.signs.data_ptr()
    addresses = x.data_ptr(), rotated.data_ptr()
    threads = torch.get_num_threads()
    _native().rotate(isa or kernels.isa(), block, signs, inverse, x.numel() // cols, cols, *addresses, threads)
    return rotated


def _in_memory(x: Tensor) -> Tensor:
    """Itself, or a copy that is contiguous and aligned. Raises KernelError where it is not in this process' memory."""
    if x.device.type != "cpu":
        raise KernelError(f"a tensor on {x.device} cannot be read by a kernel, expected one on cpu")
    x = x.contiguous()
    return x.clone() if x.data_ptr() % x.itemsize else x


def _check_rotation(rotation: Rotation, cols: int) -> None:
    block, signs = rotation
    if block < 1 or block & (block - 1) or cols < 1 or cols % block:
        raise KernelError(f"a block of {block} does not divide rows of {cols}, or is no power of two")
    if signs.shape != (cols,) or signs.dtype != torch.float32 or not signs.is_contiguous():
        raise KernelError(f"the signs do not fit rows of {cols}")


def _native() -> Any:
    if kernels._NATIVE is None:
        raise KernelError(f"the native module is not built; this installation has: {', '.join(kernels.isas())}")
    return kernels._NATIVE


@functools.cache
def _native_format(format: Format) -> Any:
    try:
        return _native().Format(
            format.coding,
            format.levels,
            _ROUNDINGS[format.rounding],
            format.divisor,
            format.gaussian_step,
            format.peak_level,
            format.either_sign,
            format.state_bits,
            format.multiplier,
        )
    except ValueError as error:
        raise KernelError(str(error)) from None
