"""Weights in few bits: `quantize(weight, spec)` gives a `StoredMatrix`, and `linear` multiplies by it."""

from epic_quant.quant.codebook import lloyd_max_rel_l2
from epic_quant.quant.formats import format_named, from_tensors, quantize
from epic_quant.quant.gptq import Hessian, OutputHessian
from epic_quant.quant.grouped import GroupedMatrix, resolved
from epic_quant.quant.linear import linear
from epic_quant.quant.plain import PlainMatrix
from epic_quant.quant.stored import StoredMatrix, Weight

__all__ = [
    "GroupedMatrix",
    "Hessian",
    "OutputHessian",
    "PlainMatrix",
    "StoredMatrix",
    "Weight",
    "format_named",
    "from_tensors",
    "linear",
    "lloyd_max_rel_l2",
    "quantize",
    "resolved",
]
