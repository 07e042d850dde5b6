"""MLX's affine quantization: `weight` uint32 [rows, cols · bits / 32], and for each group a scale and a bias.

A weight is code · scale + bias (https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html).
Codes lie in a row one after another, the lowest bit first, whatever their width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError
from epic_quant.published.folder import Module, as_bytes, published
from epic_quant.published.matrix import PublishedMatrix
from epic_quant.published.source import PublishedFile, StoredTensor
from epic_quant.quant.bitpack import BitPacking
from epic_quant.spec import PUBLISHED, WeightSpec

_PARTS = ("weight", "scales", "biases")


def read(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> PublishedFile:
    """The text tensors of a folder whose config has `quantization`. Raises CheckpointError where they do not fit it."""
    _width(checkpoint.source, quantization)
    return published(checkpoint, "MLX", lambda module: _stored(module, quantization))


def _stored(module: Module, quantization: Mapping[str, Any]) -> StoredTensor:
    if "scales" not in module:
        return module.plain()
    module.refuse_others(_PARTS)
    own = quantization.get(module.files["scales"].removesuffix(".scales"), {})
    if not isinstance(own, Mapping) and own is not True:
        raise module.fault(f"the config says {own!r} of it, but it is quantized")
    options = {**quantization, **own} if isinstance(own, Mapping) else quantization
    if (mode := options.get("mode", "affine")) != "affine":
        raise module.fault(f"mode {mode!r} of MLX is unknown here; expected affine")
    bits, group = _width(f"{module.checkpoint.source}: {module.name}", options)
    if module.dtype("weight") is not torch.uint32 or len(module.shape("weight")) != 2:
        raise module.fault(f"expected a weight of uint32 [rows, words], found {module.dtype('weight')}")
    rows, words = module.shape("weight")
    cols = words * 32 // bits
    if words * 32 % bits or cols % group:
        raise module.fault(f"{words} words of {bits} bits are no whole groups of {group}")
    for part in ("scales", "biases"):
        if module.scales(part) != (rows, cols // group):
            raise module.fault(f"{part} are {list(module.shape(part))}, expected {[rows, cols // group]}")
    spec = WeightSpec(f"mlx{bits}", group)
    return StoredTensor((rows, cols), module.nbytes, spec, partial(_matrix, module, spec, cols, bits))


def _width(where: str, options: Mapping[str, Any]) -> tuple[int, int]:
    """Bits and group. Raises CheckpointError where they are none of MLX's."""
    bits, group = options.get("bits"), options.get("group_size")
    if type(bits) is not int or f"mlx{bits}" not in PUBLISHED or type(group) is not int or group < 1:
        raise CheckpointError(f"{where}: bits {bits!r} and group_size {group!r} in the config are none of MLX's")
    return bits, group


def _matrix(module: Module, spec: WeightSpec, cols: int, bits: int) -> PublishedMatrix:
    stored = {part: module.tensor(part) for part in _PARTS}
    stored["weight"] = as_bytes(stored["weight"])
    return PublishedMatrix(stored, cols, spec, partial(_decode, bits, cols))


def _decode(bits: int, cols: int, stored: Mapping[str, Tensor]) -> Tensor:
    scale, bias = stored["scales"].float(), stored["biases"].float()
    codes = BitPacking(bits).unpack(stored["weight"], cols).float().view(*scale.shape, -1)
    return (codes * scale.unsqueeze(2) + bias.unsqueeze(2)).view(len(codes), cols)
