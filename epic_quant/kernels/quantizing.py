"""Rows to what is stored of them and back, natively; `epic_quant.quant` has the reference, and the checks.

Every function needs an instruction set: `active()` says whether there is one.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epic_quant.errors import KernelError
from epic_quant.kernels import _NATIVE, REFERENCE, bits_of, isa, row_nbytes

# The numbers of `enum class Element` and `enum class Rounding` in src/rows.h.
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROUNDINGS = {"whole": 0, "thirds": 1, "entries": 2}


@dataclass(frozen=True)
class Rule:
    """How a scheme makes codes and scales.

    Codes lie as `coding` says, `bits1` to `bits8` or `trits`, and stand for `levels`, ascending. A ratio of weight and
    scale is rounded to "whole" numbers among them, to its sign above 0.33 ("thirds"), or to the nearest of 4, 8 or 16
    "entries". The scale is the largest magnitude over `divisor`, or where that is 0 the one of least squares.
    """

    coding: str
    levels: tuple[int, ...]
    rounding: str = "whole"
    divisor: float = 0.0
    gaussian_step: float = 0.0
    peak_level: int = 0
    either_sign: bool = False


def active() -> bool:
    """Whether this process computes with native kernels."""
    return isa() != REFERENCE


class Format(NamedTuple):
    """What is stored of a row: codes with a scale for every `group_size`; with `block`, of the row turned.

    `signs` [cols], fp32, are those of the turn over the block's root.
    """

    rule: Rule
    group_size: int
    block: int
    signs: Tensor | None


def quantize(weight: Tensor, format: Format, packed: Tensor, scale: Tensor) -> int | None:
    """Write what is stored of `weight` [rows, cols] floats; gives back the first row that is not finite, or None.

    `packed` [rows, row bytes], uint8, and `scale` [rows, cols / group size], fp16. Raises KernelError for buffers that
    do not fit.
    """
    _check_stored(packed, scale, weight.shape[1], format)
    weight = _in_memory(weight if weight.dtype in _ELEMENTS else weight.float())
    if weight.shape[0] != packed.shape[0]:
        raise KernelError(f"{weight.shape[0]} rows do not fit into {packed.shape[0]}")
    bad: int = _native().quantize(
        isa(),
        *_known(format),
        *weight.shape,
        _ELEMENTS[weight.dtype],
        weight.data_ptr(),
        packed.data_ptr(),
        scale.data_ptr(),
        torch.get_num_threads(),
    )
    return None if bad < 0 else bad


def dequantize(packed: Tensor, scale: Tensor, cols: int, format: Format, dtype: torch.dtype) -> Tensor:
    """The matrix [rows, cols] in `dtype`; what that cannot hold saturates. Raises KernelError as `quantize` does."""
    packed, scale = _in_memory(packed), _in_memory(scale)
    _check_stored(packed, scale, cols, format)
    decoded = torch.empty(packed.shape[0], cols, dtype=dtype if dtype in _ELEMENTS else torch.float32)
    _native().dequantize(
        isa(),
        *_known(format),
        *decoded.shape,
        _ELEMENTS[decoded.dtype],
        decoded.data_ptr(),
        packed.data_ptr(),
        scale.data_ptr(),
        torch.get_num_threads(),
    )
    return decoded.to(dtype)


def turn(x: Tensor, block: int, signs: Tensor, *, back: bool) -> Tensor:
    """Rows of x [..., cols], fp32, turned by `signs` [cols] and Hadamard blocks, or turned back.

    Raises KernelError where the signs or the block do not fit.
    """
    cols = x.shape[-1]
    _check_turn(block, signs, cols)
    if x.dtype != torch.float32:
        raise KernelError(f"rows to turn are {x.dtype}, expected {torch.float32}")
    x = _in_memory(x)
    turned = torch.empty_like(x)
    addresses = x.data_ptr(), turned.data_ptr()
    threads = torch.get_num_threads()
    _native().turn(isa(), block, signs.data_ptr(), back, x.numel() // cols, cols, *addresses, threads)
    return turned


def _in_memory(x: Tensor) -> Tensor:
    """Itself, or a copy that is contiguous and aligned. Raises KernelError where it is not in this process' memory."""
    if x.device.type != "cpu":
        raise KernelError(f"a tensor on {x.device} is nothing that a kernel can read, expected one on cpu")
    x = x.contiguous()
    return x.clone() if x.data_ptr() % x.itemsize else x


def _check_stored(packed: Tensor, scale: Tensor, cols: int, format: Format) -> None:
    nbytes = row_nbytes(format.rule.coding, cols)
    group = format.group_size
    if cols < 1 or group < 1 or cols % group:
        raise KernelError(f"a group of {group} does not divide rows of {cols}")
    wanted = {"packed": (packed, torch.uint8, nbytes), "scale": (scale, torch.float16, cols // group)}
    for name, (buffer, dtype, row) in wanted.items():
        if buffer.dtype != dtype or buffer.shape != (packed.shape[0], row) or not buffer.is_contiguous():
            said = f"{buffer.dtype} {list(buffer.shape)}"
            raise KernelError(f"{name} is {said}, expected contiguous {dtype} {[packed.shape[0], row]}")
    if format.block:
        _check_turn(format.block, format.signs, cols)


def _check_turn(block: int, signs: Tensor | None, cols: int) -> None:
    if block < 1 or block & (block - 1) or cols < 1 or cols % block:
        raise KernelError(f"a block of {block} does not divide rows of {cols}, or is no power of two")
    if signs is None or signs.shape != (cols,) or signs.dtype != torch.float32 or not signs.is_contiguous():
        raise KernelError(f"the signs do not fit rows of {cols}")


def _known(format: Format) -> tuple[Any, int, int, int]:
    signs = 0 if format.signs is None else format.signs.data_ptr()
    return _scheme(format.rule), format.group_size, format.block, signs


def _native() -> Any:
    return _NATIVE


@functools.cache
def _scheme(rule: Rule) -> Any:
    levels = rule.levels if rule.rounding == "entries" else ()
    return _native().Scheme(
        _ROUNDINGS[rule.rounding],
        rule.levels[0],
        rule.levels[-1],
        rule.divisor,
        rule.gaussian_step,
        rule.peak_level,
        rule.either_sign,
        bits_of(rule.coding),
        list(levels),
        [(low + high) / 2 for low, high in itertools.pairwise(levels)],
    )
