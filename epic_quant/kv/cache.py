"""`KVCache`: the K and V of a batch of sequences, stored as a KV spec says; and the bytes that takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from epic_quant.errors import CacheError
from epic_quant.gemma4.config import LayerSpec, TextConfig
from epic_quant.kv.layer import LayerStore
from epic_quant.spec import KVSpec


def nbytes(spec: KVSpec, config: TextConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that a `KVCache` stores of `tokens` tokens of one sequence: of KV source layers alone.

    Counted are a token and a block that are really quantized, times how many of each the cache holds by then. What is
    not quantized is held in `dtype`. Raises SpecError where the spec does not fit the heads.
    """
    return sum(layer_nbytes(spec, layer, tokens, dtype) for layer in config.layers if layer.is_kv_source)


def layer_nbytes(spec: KVSpec, layer: LayerSpec, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """The same of one layer, as if it had K and V of its own where it does not."""
    return LayerStore(layer, spec.of(layer.layer_type), dtype).nbytes_after(tokens)


class KVCache:
    """A `gemma4.kv_store.KVStore` that holds packed codes, their scales, and what the spec leaves unquantized.

    K and V come and go in `dtype`, in which unquantized tokens are held too. Only KV source layers store any; a sharing
    layer's are its source's. `layers` has the KV specs of KV source layers that have one of their own. Raises SpecError
    where a spec does not fit the heads, and CacheError for a dtype, a batch size or a layer that makes no sense.
    """

    def __init__(
        self,
        config: TextConfig,
        spec: KVSpec,
        dtype: torch.dtype = torch.float32,
        *,
        batch_size: int = 1,
        layers: Mapping[int, KVSpec] | None = None,
    ) -> None:
        if not dtype.is_floating_point:
            raise CacheError(f"a KV cache computes in {dtype}; expected a float dtype")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise CacheError(f"a KV cache holds a batch of {batch_size!r} sequences; expected 1 or more")
        self.dtype, self.batch_size = dtype, batch_size
        self._layers = config.layers
        own = layers or {}
        for index in own:
            self._source(index)
        self._stores = {
            layer.index: LayerStore(layer, own.get(layer.index, spec).of(layer.layer_type), dtype, batch_size)
            for layer in config.layers
            if layer.is_kv_source
        }

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take tokens in, and give back all that they attend to: [batch, num_kv_heads, keys, head_dim], twice.

        k and v are [batch, num_kv_heads, tokens, head_dim] in the cache's dtype, after norm and RoPE. The last key is
        the newest token's; on sliding layers there are at least as many as any of these tokens sees. A later call may
        overwrite the result. Raises CacheError, and stores nothing, as `append` does.
        """
        store, window = self._checked(layer, k, v), self._layers[layer].attention.sliding_window
        before, tokens = store.tokens, k.shape[-2]
        if window is None or tokens == 1 or before + tokens <= window:
            store.append(k, v)
            return store.keys(), store.values()
        # The first of several tokens still sees keys that the cache drops when it takes the last one. So they go in by
        # at most a window at a time, and each chunk is read back, after the keys that were there before.
        chunks = [(store.keys().clone(), store.values().clone())] if before else []
        for first in range(0, tokens, window):
            its_k, its_v = k[..., first : first + window, :], v[..., first : first + window, :]
            store.append(its_k, its_v)
            newest = slice(-its_k.shape[-2], None)
            chunks.append((store.keys()[..., newest, :].clone(), store.values()[..., newest, :].clone()))
        return torch.cat([keys for keys, _ in chunks], dim=-2), torch.cat([values for _, values in chunks], dim=-2)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take tokens in; see `update`.

        Raises CacheError, and stores nothing, for another shape or dtype, for NaN or infinity, and for a layer that is
        not there or shares another's K and V.
        """
        self._checked(layer, k, v).append(k, v)

    def keys(self, layer: int) -> Tensor:
        """The newest keys, oldest first: [batch, num_kv_heads, kept, head_dim]. A later `append` may overwrite them.

        On sliding layers these are the newest `sliding_window`. Raises CacheError where there are none yet.
        """
        return self._filled(layer).keys()

    def values(self, layer: int) -> Tensor:
        """The values of the same tokens."""
        return self._filled(layer).values()

    def tokens(self, layer: int) -> int:
        """Tokens of each sequence that the layer, or its source, has taken in."""
        return self._stores[self._layer(layer).kv_source].tokens

    def reset(self) -> None:
        """Drop all sequences; allocated memory is kept for the next ones."""
        for store in self._stores.values():
            store.reset()

    @property
    def nbytes(self) -> int:
        """Bytes stored of the tokens held: packed codes, scales, unquantized tokens. Spare room is not counted."""
        return sum(store.nbytes for store in self._stores.values())

    @property
    def allocated_nbytes(self) -> int:
        """The same with the spare room that lets it grow: at most half as much again, beyond the first tokens."""
        return sum(store.allocated_nbytes for store in self._stores.values())

    def layer_nbytes(self, layer: int) -> int:
        """Bytes stored of one layer; 0 for a sharing one."""
        return self._stores[layer].nbytes if self._layer(layer).is_kv_source else 0

    @property
    def bits_per_value(self) -> float:
        """Bits stored for every number that `keys` and `values` give. Raises CacheError while it is empty."""
        values = sum(
            2 * layer.attention.num_kv_heads * self._stores[layer.index].kept * layer.attention.head_dim
            for layer in self._layers
            if layer.is_kv_source
        )
        if values == 0:
            raise CacheError("an empty KV cache has no bits per value")
        return 8 * self.nbytes / (values * self.batch_size)

    def _layer(self, layer: int) -> LayerSpec:
        if not 0 <= layer < len(self._layers):
            raise CacheError(f"there is no layer {layer}; expected 0 to {len(self._layers) - 1}")
        return self._layers[layer]

    def _filled(self, layer: int) -> LayerStore:
        store = self._stores[self._layer(layer).kv_source]
        if store.tokens == 0:
            raise CacheError(f"layer {layer} holds no K and V yet")
        return store

    def _source(self, layer: int) -> LayerSpec:
        spec = self._layer(layer)
        if not spec.is_kv_source:
            raise CacheError(f"layer {layer} stores no K and V: it shares those of layer {spec.kv_source}")
        return spec

    def _checked(self, layer: int, k: Tensor, v: Tensor) -> LayerStore:
        """The layer's store, which can take k and v."""
        spec = self._source(layer)
        self._check("K", k, spec)
        self._check("V", v, spec)
        if k.shape != v.shape:
            raise CacheError(f"layer {layer} got K of {k.shape[2]} tokens and V of {v.shape[2]}")
        return self._stores[layer]

    def _check(self, what: str, x: Tensor, spec: LayerSpec) -> None:
        heads, dims = spec.attention.num_kv_heads, spec.attention.head_dim
        fits = x.dim() == 4 and (*x.shape[:2], x.shape[3]) == (self.batch_size, heads, dims) and x.shape[2] > 0
        if not fits:
            expected = f"[{self.batch_size}, {heads}, tokens, {dims}]"
            raise CacheError(f"{what} of layer {spec.index} is of shape {list(x.shape)}; expected {expected}")
        if x.dtype != self.dtype:
            raise CacheError(f"{what} of layer {spec.index} is {x.dtype}; this cache's dtype is {self.dtype}")
        if not x.float().isfinite().all():
            raise CacheError(f"{what} of layer {spec.index} has NaN or infinity")
