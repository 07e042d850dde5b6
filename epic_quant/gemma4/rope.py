"""Rotary position embedding, of all of a head's dims or of some ("proportional", p-RoPE).

A head's dims d and d + head_dim / 2 are a pair that is rotated by position * inverse_frequency[d]. Proportional RoPE
rotates only the first pairs; the frequencies of the others are zero, so these dims carry no position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from epic_quant.gemma4.config import GroupedQueryAttention


class RopeTable(NamedTuple):
    """Cosine and sine of every position's angles, each [tokens, head_dim]."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(attention: GroupedQueryAttention) -> Tensor:
    """Radians a position of each pair: theta^(-2d / head_dim) / factor, then zeros; fp32 [head_dim / 2].

    The exponent's denominator is head_dim, however few pairs rotate.
    """
    exponents = torch.arange(0, 2 * attention.rope.rotated_pairs, 2, dtype=torch.float32) / attention.head_dim
    rotating = 1.0 / (attention.rope.theta**exponents) / attention.rope.factor
    return torch.nn.functional.pad(rotating, (0, attention.head_dim // 2 - attention.rope.rotated_pairs))


def rotated_dims(attention: GroupedQueryAttention) -> Tensor:
    """The dims of a head that carry position, ascending, int64. All others are the same at every position."""
    pairs = inverse_frequencies(attention).nonzero().flatten()
    return torch.cat([pairs, pairs + attention.head_dim // 2])


def rope_table(attention: GroupedQueryAttention, positions: Tensor, dtype: torch.dtype) -> RopeTable:
    """The table of a layer type for positions [tokens]; angles, cosine and sine in fp32, then cast to `dtype`."""
    angles = positions[:, None].float() * inverse_frequencies(attention)  # [tokens, head_dim / 2]
    angles = torch.cat([angles, angles], dim=-1)
    return RopeTable(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, rope: RopeTable) -> Tensor:
    """Rotate every head of x [..., tokens, head_dim] by its token's angles."""
    first, second = x.chunk(2, dim=-1)
    return x * rope.cos + torch.cat([-second, first], dim=-1) * rope.sin
