"""Weights in few bits: `quantizer(spec).quantize(weight)` gives a `QuantizedTensor`, and `linear` multiplies by it."""

from epic_quant.quant.base import QuantizedTensor, Quantizer
from epic_quant.quant.codebook import lloyd_max_rel_l2
from epic_quant.quant.linear import Weight, linear
from epic_quant.quant.spec import SCHEMES, quantizer

__all__ = ["SCHEMES", "QuantizedTensor", "Quantizer", "Weight", "linear", "lloyd_max_rel_l2", "quantizer"]
