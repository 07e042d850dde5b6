"""Rotating rows by random signs and an orthonormal block Hadamard transform: y = (x · signs) H, block by block.

It spreads outliers over their block, so that what is quantized looks Gaussian. Neither the signs nor the matrix are
stored: both follow from the row length and the block.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from epic_quant.quant import backends
from epic_quant.quant.backends import Rotation

# One choice for all weights, so that it needs no byte in any of them.
_SIGN_SEED = 0x6EA4


def block_for(cols: int, block: int) -> int:
    """The largest power of two, at most `block`, that divides a row of `cols`."""
    return min(block, cols & -cols)


def rotate(x: Tensor, block: int, backend: str | None = None) -> Tensor:
    """[..., cols] float to the same shape and dtype; keeps every norm and inner product. `backend` as in `backends`."""
    found = backends.rotate(x, rotation(x.shape[-1], block), backend, inverse=False)
    return _in_fp32(x, lambda x: _transform(x * _signs_like(x, block), block)) if found is None else found


def unrotate(x: Tensor, block: int, backend: str | None = None) -> Tensor:
    """The inverse of `rotate`, which is its transpose."""
    found = backends.rotate(x, rotation(x.shape[-1], block), backend, inverse=True)
    return _in_fp32(x, lambda x: _unrotate(x, _signs_like(x, block), block)) if found is None else found


def rotation(cols: int, block: int) -> Rotation:
    """The rotation of rows of `cols` as kernels take it."""
    return Rotation(block, signs(cols, block))


@functools.lru_cache(maxsize=64)
def signs(cols: int, block: int) -> Tensor:
    """[cols] of ±1 / √block, fp32. Python's generator, since its bits are the same in every version."""
    bits = random.Random(_SIGN_SEED).getrandbits(cols)
    ones = torch.tensor([1.0 if bits >> column & 1 else -1.0 for column in range(cols)])
    return ones / math.sqrt(block)


def _unrotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    return _transform(x * signs[0].abs(), block) * signs.sign()


def _transform(x: Tensor, block: int) -> Tensor:
    """The product with Sylvester's matrix of ones in every block: sums and differences of numbers 1, 2, 4 … apart."""
    apart = 1
    while apart < block:
        first, second = x.reshape(-1, 2, apart).unbind(1)
        x = torch.stack([first + second, first - second], dim=1).view(x.shape)
        apart *= 2
    return x


def _signs_like(x: Tensor, block: int) -> Tensor:
    return signs(x.shape[-1], block).to(x)


def _in_fp32(x: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """In half precision, sums would lose what the rotation is to keep."""
    return transform(x) if x.dtype.itemsize > 2 else transform(x.float()).to(x.dtype)
