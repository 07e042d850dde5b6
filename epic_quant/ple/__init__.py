"""The per-layer-embedding (PLE) table, of which only some rows stay in RAM."""

from epic_quant.ple.cache import CacheStats, PLERowCache
from epic_quant.ple.packing import pack_table
from epic_quant.ple.traces import frequent_ids
from epic_quant.spec import RESIDENCIES

__all__ = ["RESIDENCIES", "CacheStats", "PLERowCache", "frequent_ids", "pack_table"]
