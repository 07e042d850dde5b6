"""ggml's block formats, byte for byte: what a GGUF file holds of a matrix, with an encoder of this project."""

from epic_quant.quant.ggml.types import FORMATS, as_blocks

__all__ = ["FORMATS", "as_blocks"]
