"""The keys and values that attention reads: of this forward, of a cache, and of the layers that share them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from epic_quant.errors import TokenError
from epic_quant.gemma4.config import LayerSpec, TextConfig


class KVStore(Protocol):
    """A cache of the K and V of one sequence. Only layers that own K and V are ever asked for.

    A full layer's store keeps every token; a sliding layer's may keep only the newest `sliding_window`. What `keys`
    and `values` return may be overwritten by a later `append`.
    """

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Add k and v of [num_kv_heads, tokens, head_dim], after norm and RoPE."""
        ...

    def keys(self, layer: int) -> Tensor:
        """The newest keys, oldest first: [num_kv_heads, kept, head_dim]."""
        ...

    def values(self, layer: int) -> Tensor:
        """The values of the same tokens: [num_kv_heads, kept, head_dim]."""
        ...


class ForwardKV:
    """The K and V of one forward: tokens `start` to `start + tokens - 1`, after those that the cache has.

    What a layer attends to comes back from the cache, so a lossy cache shows in the result; without one it is the K
    and V of this forward alone. Sharing layers read what their source attended to: a cache may by then have dropped
    keys that the forward's earlier tokens still see.
    """

    def __init__(self, config: TextConfig, cache: KVStore | None = None, start: int = 0) -> None:
        self._cache, self._start = cache, start
        self._sources = {spec.kv_source for spec in config.layers if not spec.is_kv_source}
        self._shared: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, spec: LayerSpec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take a KV source layer's new k and v, [batch, num_kv_heads, tokens, head_dim]; return all that it attends to.

        That is [batch, num_kv_heads, keys, head_dim], the last key being the newest token's. Raises TokenError where
        the cache holds another number of tokens than `start` says.
        """
        if self._cache is not None:
            keys, values = self._through(self._cache, spec, k[0], v[0])
            k, v = keys[None].to(k.dtype), values[None].to(v.dtype)
        if spec.index in self._sources:
            self._shared[spec.index] = k, v
        return k, v

    def read(self, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        """The K and V that a sharing layer attends to: its source's, of this forward."""
        return self._shared[spec.kv_source]

    def _through(self, cache: KVStore, spec: LayerSpec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        layer, window, tokens = spec.index, spec.attention.sliding_window, k.shape[-2]
        total = self._start + tokens
        if window is None or tokens == 1 or total <= window:
            cache.append(layer, k, v)
            keys, values = cache.keys(layer), cache.values(layer)
            if keys.shape[-2] > total or keys.shape[-2] < min(total, window or total):
                raise TokenError(
                    f"the cache returned {keys.shape[-2]} keys of layer {layer} for {total} tokens, "
                    f"{self._start} of them before this forward: is `start` the number of tokens it has?"
                )
            return keys, values
        # The first of several tokens still sees keys that the cache drops when it takes the last one. So they go in by
        # at most a window at a time, and each lot is read back, after the keys that were there before.
        lots = [(cache.keys(layer).clone(), cache.values(layer).clone())] if self._start else []
        for first in range(0, tokens, window):
            lot = k[:, first : first + window]
            cache.append(layer, lot, v[:, first : first + window])
            newest = slice(-lot.shape[-2], None)
            lots.append((cache.keys(layer)[:, newest].clone(), cache.values(layer)[:, newest].clone()))
        return torch.cat([keys for keys, _ in lots], dim=-2), torch.cat([values for _, values in lots], dim=-2)
