"""The hot loops over raw buffers, in C++, each beside a plain torch reference elsewhere that says what it computes.

The native module is built when the package is installed, where there is a compiler. `EPIC_QUANT_ISA` forces an
instruction set, or `reference`, which is torch alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from epic_quant.errors import KernelError, unknown

REFERENCE = "reference"

# In what form activations may meet packed weights.
ACTIVATIONS = ("fp32", "int8")

# How codes may lie in a row that is multiplied by, and the number that C++ knows it by.
_CODINGS = {"bits2": 2, "bits3": 3, "bits4": 4, "bits8": 8, "trits": 5}


def _load() -> ModuleType | None:
    try:
        from epic_quant.kernels import _native
    except ImportError:
        return None
    return _native


_NATIVE = _load()


def isas() -> list[str]:
    """What this installation can compute with on this machine, fastest first; the last is the torch reference."""
    return [*(_NATIVE.isas() if _NATIVE else ()), REFERENCE]


@functools.cache
def isa() -> str:
    """The one it computes with: the fastest, or that which `EPIC_QUANT_ISA` names.

    Raises KernelError where that is none of `isas()`.
    """
    forced = os.environ.get("EPIC_QUANT_ISA")
    if not forced:
        return isas()[0]
    if forced not in isas():
        raise KernelError(f"EPIC_QUANT_ISA is {forced!r}, but this machine has: {', '.join(isas())}")
    return forced


def has_kernels(coding: str) -> bool:
    """Whether there are kernels here for codes that lie so."""
    return coding in _CODINGS and isa() != REFERENCE


def description() -> str:
    """One line for people: what computes, and what else could."""
    if _NATIVE is None:
        return "torch reference (the native module is not built; a C++17 compiler and a new install build it)"
    threads = {"openmp": "torch's threads", "own": "threads of its own"}[_NATIVE.threads_of()]
    return f"{isa()} of {', '.join(isas())}; {threads}"


def sum_of(words: Tensor) -> int:
    """The sum of int64 `words` modulo 2^64, read once by torch's number of threads as fast as memory gives them.

    Raises KernelError where `words` is not contiguous int64 in memory.
    """
    if words.dtype is not torch.int64 or words.device.type != "cpu" or not words.is_contiguous():
        raise KernelError(f"words are {words.dtype} on {words.device}, expected contiguous torch.int64")
    if _NATIVE is None or isa() == REFERENCE:
        return int(words.sum()) % 2**64
    return int(_NATIVE.sum_of_words(words.data_ptr(), words.numel(), torch.get_num_threads()))


def bits_of(coding: str) -> int:
    """Bits of a code that lies as `bits1` to `bits8` say; 0 for `trits`."""
    return 0 if coding == "trits" else int(coding.removeprefix("bits"))


def row_nbytes(coding: str, cols: int) -> int:
    """Bytes of a row of codes, as `quant.bitpack` packs them: bits that are left over fill a last byte."""
    return -(-cols // 5) if coding == "trits" else -(-cols * bits_of(coding) // 8)


class PackedMatrix:
    """A matrix [rows, cols] as stored, ready to multiply by.

    `packed` [rows, row bytes] uint8 holds a row's codes as `coding` says: `bits2`, `bits3`, `bits4` or `bits8`, the
    lowest bit first across byte borders, or `trits`, five base-3 digits a byte, the first as the lowest. `scale`
    [rows, scales a row] fp16 is one for every cols / scales weights in a row. A weight is its scale times
    `levels[code]`, whole numbers in [-128, 127]. The matrix keeps both tensors. Raises KernelError for buffers that do
    not fit that, and for an instruction set that has no kernels here.
    """

    def __init__(
        self, packed: Tensor, scale: Tensor, cols: int, coding: str, levels: Sequence[int], isa: str | None = None
    ) -> None:
        self._arguments = packed, scale, cols, coding, tuple(levels), isa
        self.isa = isa or globals()["isa"]()
        if _NATIVE is None or self.isa not in isas()[:-1]:
            raise KernelError(f"no kernels for {self.isa!r}; this machine has: {', '.join(isas())}")
        if coding not in _CODINGS:
            raise KernelError(f"coding is {coding!r}, expected one of {', '.join(_CODINGS)}")
        if cols < 1:
            raise KernelError(f"{cols} columns, expected 1 or more")
        nbytes = row_nbytes(coding, cols)
        _check("packed", packed, torch.uint8)
        _check("scale", scale, torch.float16)
        rows = packed.shape[0]
        if not rows or packed.shape[1] != nbytes:
            raise KernelError(f"packed is {list(packed.shape)}, expected [1 or more, {nbytes}]")
        if scale.shape[0] != rows or not scale.shape[1] or cols % scale.shape[1]:
            raise KernelError(f"scale is {list(scale.shape)}, expected [{rows}, a divisor of {cols}]")
        zero, table = _levels_for(coding, levels)
        self.shape = rows, cols
        sizes = rows, cols, nbytes, scale.shape[1]
        self._native: Any = _NATIVE.Matrix(
            self.isa, packed.data_ptr(), scale.data_ptr(), *sizes, _CODINGS[coding], zero, table
        )

    def __reduce__(self) -> tuple[type[PackedMatrix], tuple[Any, ...]]:
        return PackedMatrix, self._arguments

    def linear(self, x: Tensor, activations: str = "fp32") -> Tensor:
        """`x` [..., cols], any float dtype but computed in fp32, times the transpose: [..., rows] in x's dtype.

        Activations "fp32" are exact to fp32's rounding; "int8" rounds them to 8 bits with a scale for a block of at
        most 320 in a row. A row of x with NaN or infinity may give NaN where infinity would be right. Raises
        KernelError for other activations, no tokens, other inner dims, or what is no float tensor in memory.
        """
        if activations not in ACTIVATIONS:
            raise KernelError(unknown("activations", activations, ACTIVATIONS))
        rows, cols = self.shape
        if x.layout is not torch.strided or x.device.type != "cpu" or not x.is_floating_point():
            raise KernelError(f"x is {x.dtype} on {x.device}, expected floats in memory")
        if x.dim() == 0 or x.shape[-1] != cols:
            raise KernelError(f"x is {list(x.shape)}, expected [..., {cols}]")
        tokens = x.numel() // cols
        if not tokens:
            raise KernelError(f"x is {list(x.shape)}: no tokens")
        values = x.detach().to(torch.float32).contiguous()
        if values.data_ptr() % values.itemsize:
            values = values.clone()
        out = torch.empty(*x.shape[:-1], rows)
        self._native.linear(values.data_ptr(), tokens, out.data_ptr(), activations == "int8", torch.get_num_threads())
        return out.to(x.dtype)


def _levels_for(coding: str, levels: Sequence[int]) -> tuple[int, bytes]:
    """The zero point of evenly spaced levels and no table, or a table where they are none."""
    num_codes = 3 if coding == "trits" else 1 << _CODINGS[coding]
    if not 0 < len(levels) <= num_codes or not all(-128 <= level <= 127 for level in levels):
        raise KernelError(f"{len(levels)} levels for {coding}, expected up to {num_codes} in [-128, 127]")
    zero = -levels[0]
    if all(level == code - zero for code, level in enumerate(levels)) and (coding != "bits8" or zero == 128):
        return zero, b""
    if coding in ("bits8", "trits") or min(levels) < -127:
        raise KernelError(f"levels of {coding} are {min(levels)} to {max(levels)} unevenly, which no kernel has")
    return 0, bytes(level & 0xFF for level in levels)


def _check(name: str, buffer: Tensor, dtype: torch.dtype) -> None:
    if buffer.dtype is not dtype or buffer.dim() != 2 or buffer.device.type != "cpu":
        raise KernelError(f"{name} is {buffer.dtype} {list(buffer.shape)} on {buffer.device}, expected {dtype}, 2 dims")
    if not buffer.is_contiguous() or buffer.data_ptr() % buffer.itemsize:
        raise KernelError(f"{name} is not contiguous and aligned")
