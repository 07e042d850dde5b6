"""How keys and values are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epic_quant.errors import SpecError, unknown
from epic_quant.gemma4.config import TextConfig

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class KVPolicy:
    """The storage of the KV cache, named by `spec`: `bf16` or `fp32`. Raises SpecError on another."""

    spec: str = "bf16"

    def __post_init__(self) -> None:
        if self.spec not in _DTYPES:
            raise SpecError(unknown("KV policy", self.spec, _DTYPES))

    def __str__(self) -> str:
        return self.spec

    def nbytes(self, config: TextConfig, tokens: int) -> int:
        """Bytes of the K and V of `tokens` tokens: the layers that own them alone, sliding ones up to their window.

        They are counted on tensors of torch's meta device, which have a shape and a dtype and no memory.
        """
        total = 0
        for layer in config.layers:
            if layer.owns_kv:
                kept = tokens if layer.sliding_window is None else min(tokens, layer.sliding_window)
                shape = (2, layer.num_kv_heads, kept, layer.head_dim)
                total += torch.empty(shape, dtype=_DTYPES[self.spec], device="meta").nbytes
        return total
