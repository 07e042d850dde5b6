"""`KVCache`: the K and V of one sequence, stored as a policy says."""

from __future__ import annotations

import torch
from torch import Tensor

from epic_quant.errors import CacheError
from epic_quant.gemma4.config import LayerSpec, TextConfig
from epic_quant.kv.layer import LayerStore
from epic_quant.kv.policy import KVPolicy


class KVCache:
    """A `gemma4.kv_store.KVStore` that holds packed codes, their scales, and what the policy leaves unquantized.

    K and V come and go in `dtype`, in which unquantized tokens are held too. Only layers that own K and V store any; a
    sharing layer's are its source's. Raises SpecError where the policy does not fit the heads.
    """

    def __init__(self, config: TextConfig, policy: KVPolicy, dtype: torch.dtype = torch.float32) -> None:
        if not dtype.is_floating_point:
            raise CacheError(f"a KV cache computes in {dtype}; expected a float dtype")
        self.policy, self.dtype = policy, dtype
        self._specs = config.layers
        self._stores = {
            spec.index: LayerStore(spec, policy.layer(spec), dtype) for spec in config.layers if spec.is_kv_source
        }

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Add k and v of [num_kv_heads, tokens, head_dim] in the cache's dtype, after norm and RoPE.

        Raises CacheError, and stores nothing, for another shape or dtype, for NaN or infinity, and for a layer that is
        not there or shares another's K and V.
        """
        spec = self._spec(layer)
        if not spec.is_kv_source:
            raise CacheError(f"layer {layer} stores no K and V: it shares those of layer {spec.kv_source}")
        self._check("K", k, spec)
        self._check("V", v, spec)
        if k.shape != v.shape:
            raise CacheError(f"layer {layer} got K of {k.shape[1]} tokens and V of {v.shape[1]}")
        self._stores[layer].append(k, v)

    def keys(self, layer: int) -> Tensor:
        """The newest keys, oldest first: [num_kv_heads, kept, head_dim]. A later `append` may overwrite them.

        On sliding layers these are the newest `sliding_window`. Raises CacheError where there are none yet.
        """
        return self._filled(layer).keys()

    def values(self, layer: int) -> Tensor:
        """The values of the same tokens."""
        return self._filled(layer).values()

    def reset(self) -> None:
        """Forget the sequence. What is allocated stays, for the next one."""
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
        spec = self._spec(layer)
        return self._stores[layer].nbytes if spec.is_kv_source else 0

    @property
    def bits_per_value(self) -> float:
        """Bits stored for every number that `keys` and `values` give. Raises CacheError while it is empty."""
        values = sum(
            2 * spec.attention.num_kv_heads * self._stores[spec.index].kept * spec.attention.head_dim
            for spec in self._specs
            if spec.is_kv_source
        )
        if values == 0:
            raise CacheError("an empty KV cache has no bits per value")
        return 8 * self.nbytes / values

    def _spec(self, layer: int) -> LayerSpec:
        if not 0 <= layer < len(self._specs):
            raise CacheError(f"there is no layer {layer}; expected 0 to {len(self._specs) - 1}")
        return self._specs[layer]

    def _filled(self, layer: int) -> LayerStore:
        store = self._stores[self._spec(layer).kv_source]
        if store.tokens == 0:
            raise CacheError(f"layer {layer} holds no K and V yet")
        return store

    def _check(self, what: str, x: Tensor, spec: LayerSpec) -> None:
        expected = f"[{spec.attention.num_kv_heads}, tokens, {spec.attention.head_dim}]"
        if (
            x.dim() != 3
            or (x.shape[0], x.shape[2]) != (spec.attention.num_kv_heads, spec.attention.head_dim)
            or x.shape[1] == 0
        ):
            raise CacheError(f"{what} of layer {spec.index} is of shape {list(x.shape)}; expected {expected}")
        if x.dtype != self.dtype:
            raise CacheError(f"{what} of layer {spec.index} is {x.dtype}; this cache's dtype is {self.dtype}")
        if not x.float().isfinite().all():
            raise CacheError(f"{what} of layer {spec.index} has NaN or infinity")
