"""Keys and values in few bits: a `KVSpec` says how, a `KVCache` holds them."""

from epic_quant.kv.cache import KVCache, layer_nbytes, nbytes

__all__ = ["KVCache", "layer_nbytes", "nbytes"]
