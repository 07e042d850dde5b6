"""Rotary position embedding, of all of a head's dims or of some ("proportional", p-RoPE).

A head's dims d and d + head_dim / 2 are a pair that turns by position * inverse_frequency[d]. Proportional RoPE turns
only the first pairs; the frequencies of the others are zero, so these dims carry no position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from epic_quant.gemma4.config import LayerSpec


class RopeTable(NamedTuple):
    """Cosine and sine of every position's angles, each [tokens, head_dim]."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(spec: LayerSpec) -> Tensor:
    """Radians a position of each pair: theta^(-2d / head_dim) / factor, then zeros; fp32 [head_dim / 2].

    The exponent's denominator is head_dim, however few pairs turn.
    """
    exponents = torch.arange(0, 2 * spec.rotated_pairs, 2, dtype=torch.float32) / spec.head_dim
    turning = 1.0 / (spec.rope_theta**exponents) / spec.rope_factor
    return torch.nn.functional.pad(turning, (0, spec.head_dim // 2 - spec.rotated_pairs))


def rotated_dims(spec: LayerSpec) -> Tensor:
    """The dims of a head that carry position, ascending, int64. All others are the same at every position."""
    pairs = inverse_frequencies(spec).nonzero().flatten()
    return torch.cat([pairs, pairs + spec.head_dim // 2])


def rope_table(spec: LayerSpec, positions: Tensor, dtype: torch.dtype) -> RopeTable:
    """The table of a layer type for positions [tokens]; angles, cosine and sine in fp32, then cast to `dtype`."""
    angles = positions[:, None].float() * inverse_frequencies(spec)  # [tokens, head_dim / 2]
    angles = torch.cat([angles, angles], dim=-1)
    return RopeTable(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, rope: RopeTable) -> Tensor:
    """Turn every head of x [..., tokens, head_dim] by its token's angles."""
    first, second = x.chunk(2, dim=-1)
    return x * rope.cos + torch.cat([-second, first], dim=-1) * rope.sin
