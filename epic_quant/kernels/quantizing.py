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

from epic_quant import kernels

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
    return kernels.isa() != kernels.REFERENCE


class Format(NamedTuple):
    """What is stored of a row: codes with a scale for every `group_size`; with `block`, of the row turned.

    `signs` [cols], fp32, are those of the turn over the block's root.
    """

    rule: Rule
    group_size: int
    block: int
    signs: Tensor | None


def quantize(weight: Tensor, format: Format, packed: Tensor, scale: Tensor) -> int | None:
    """Write what is stored of `weight` [rows, cols]; gives back the first row that is not finite, or None.

    `packed` [rows, row bytes], uint8, and `scale` [rows, scales a row], fp16, are contiguous.
    """
    weight = (weight if weight.dtype in _ELEMENTS else weight.float()).contiguous()
    bad: int = _native().quantize(
        kernels.isa(),
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
    """The matrix [rows, cols] in `dtype`; what that cannot hold saturates."""
    decoded = torch.empty(len(packed), cols, dtype=dtype if dtype in _ELEMENTS else torch.float32)
    packed, scale = packed.contiguous(), scale.contiguous()
    _native().dequantize(
        kernels.isa(),
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
    """Rows of x [..., cols], fp32, turned by signs and Hadamard blocks, or turned back."""
    x = x.contiguous()
    turned = torch.empty_like(x)
    cols = x.shape[-1]
    _native().turn(
        kernels.isa(),
        block,
        signs.data_ptr(),
        back,
        x.numel() // cols,
        cols,
        x.data_ptr(),
        turned.data_ptr(),
        torch.get_num_threads(),
    )
    return turned


def _known(format: Format) -> tuple[Any, int, int, int]:
    signs = 0 if format.signs is None else format.signs.data_ptr()
    return _scheme(format.rule), format.group_size, format.block, signs


def _native() -> Any:
    return kernels._NATIVE


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
        0 if rule.coding == "trits" else int(rule.coding.removeprefix("bits")),
        list(levels),
        [(low + high) / 2 for low, high in itertools.pairwise(levels)],
    )
