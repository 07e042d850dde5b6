"""Quantized files as others publish them: `source.PublishedFile`, read by the module of its format.

Each format's module has `read`, which takes the headers alone, and the map from the file's names to canonical ones.
"""

from epic_quant.published.opening import open_published
from epic_quant.published.source import PublishedFile, PublishedWeights

__all__ = ["PublishedFile", "PublishedWeights", "open_published"]
