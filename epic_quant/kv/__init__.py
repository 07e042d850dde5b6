"""Keys and values in few bits: a `KVPolicy` says how, a `KVCache` holds those of one sequence."""

from epic_quant.kv.cache import KVCache
from epic_quant.kv.policy import NAMED, KVPolicy
from epic_quant.kv.storage import LayerPolicy, Storage

__all__ = ["NAMED", "KVCache", "KVPolicy", "LayerPolicy", "Storage"]
