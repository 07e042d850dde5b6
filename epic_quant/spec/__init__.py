"""Specs as values: how weights, K and V and the PLE table are stored. Standard library only.

Each spec is frozen, hashable and picklable, and has one grammar: `parse` and `str` are inverses. No other package takes
such a text apart.
"""

from epic_quant.spec.formats import FORMATS, PUBLISHED, FormatInfo
from epic_quant.spec.kv import NAMED_KV, KVSpec, KVStorageSpec, LayerKVSpec, PCASpec
from epic_quant.spec.layers import format_layers, parse_layers
from epic_quant.spec.ple import RESIDENCIES, PLESpec
from epic_quant.spec.policy import KV_CACHE, NAMED, NOISE_FLOOR, REFERENCE, PolicySpec, recipe_name
from epic_quant.spec.tensors import KINDS, Target, TensorClass
from epic_quant.spec.weight import BF16, WeightSpec

__all__ = [
    "BF16",
    "FORMATS",
    "KINDS",
    "KV_CACHE",
    "NAMED",
    "NAMED_KV",
    "NOISE_FLOOR",
    "PUBLISHED",
    "REFERENCE",
    "RESIDENCIES",
    "FormatInfo",
    "KVSpec",
    "KVStorageSpec",
    "LayerKVSpec",
    "PCASpec",
    "PLESpec",
    "PolicySpec",
    "Target",
    "TensorClass",
    "WeightSpec",
    "format_layers",
    "parse_layers",
    "recipe_name",
]
