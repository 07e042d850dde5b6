"""Turning rows by random signs and an orthonormal block Hadamard transform: y = (x · signs) H, block by block.

It spreads outliers over their block, so that what is quantized looks Gaussian. Neither the signs nor the matrix are
stored: both follow from the row length and the block.
"""

from __future__ import annotations

import functools
import math
import random

import torch
from torch import Tensor

# One choice for all weights, so that it needs no byte in any of them.
_SIGN_SEED = 0x6EA4
MAX_BLOCK = 4096


def block_for(cols: int, block: int) -> int:
    """The largest power of two, at most `block`, that divides a row of `cols`."""
    return min(block, cols & -cols)


def turn(x: Tensor, block: int) -> Tensor:
    """[..., cols] float to the same shape and dtype; keeps every norm and inner product."""
    return _transform(x * _signs(x.shape[-1]).to(x.dtype), block)


def turn_back(x: Tensor, block: int) -> Tensor:
    """The inverse of `turn`, which is its transpose."""
    return _transform(x, block) * _signs(x.shape[-1]).to(x.dtype)


def _transform(x: Tensor, block: int) -> Tensor:
    return (x.reshape(-1, block) @ _matrix(block).to(x.dtype)).view(x.shape)


@functools.cache
def _matrix(block: int) -> Tensor:
    """Sylvester's Hadamard matrix [block, block] over √block: symmetric, and its own inverse."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(block)


@functools.lru_cache(maxsize=64)
def _signs(cols: int) -> Tensor:
    """[cols] of ±1. Python's generator, since its bits are the same in every version."""
    bits = random.Random(_SIGN_SEED).getrandbits(cols)
    return torch.tensor([1.0 if bits >> column & 1 else -1.0 for column in range(cols)])
