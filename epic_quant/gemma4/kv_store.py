"""The keys and values that attention reads: of this forward, of a cache, and of the layers that share them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from epic_quant.errors import TokenError
from epic_quant.gemma4.config import LayerSpec, TextConfig


class KVStore(Protocol):
    """A cache of the K and V of a batch of sequences. Only KV source layers are ever asked for."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [batch, num_kv_heads, tokens, head_dim], after norm and RoPE; give back what they attend to.

        That is [batch, num_kv_heads, keys, head_dim] twice, oldest first, the last key being the newest token's: on
        full layers every token so far, on sliding ones at least all that any of these tokens sees. A later call may
        overwrite it.
        """
        ...


class ForwardKV:
    """The K and V of one forward: tokens `start` on, after those that the cache has.

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
            total = self._start + k.shape[-2]
            least = min(total, spec.attention.sliding_window or total)
            keys, values = self._cache.update(spec.index, k, v)
            if not least <= keys.shape[-2] <= total:
                raise TokenError(
                    f"the cache returned {keys.shape[-2]} keys of layer {spec.index} for {total} tokens, "
                    f"{self._start} of them before this forward: is `start` the number of tokens it has?"
                )
            k, v = keys.to(k.dtype), values.to(v.dtype)
        if spec.index in self._sources:
            self._shared[spec.index] = k, v
        return k, v

    def read(self, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        """The K and V that a sharing layer attends to: its source's, of this forward."""
        return self._shared[spec.kv_source]
