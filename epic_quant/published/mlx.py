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
from epic_quant.published.folder import Module, as_bytes, modules
from epic_quant.published.matrix import PublishedMatrix
from epic_quant.published.source import PublishedFile, StoredTensor
from epic_quant.quant.bitpack import BitPacking
from epic_quant.spec import PUBLISHED, WeightSpec

_PARTS = ("weight", "scales", "biases")


def read(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> PublishedFile:
    """The text tensors of a folder whose config has `quantization`. Raises CheckpointError where they do not fit it."""
    found, others = modules(checkpoint)
    return PublishedFile(
        source=checkpoint.source,
        kind="MLX",
        tensors={
            name: _stored(module, quantization) if "scales" in module else module.plain()
            for name, module in found.items()
        },
        others=others,
        fingerprint=checkpoint.fingerprint,
    )


def _stored(module: Module, quantization: Mapping[str, Any]) -> StoredTensor:
    module.refuse_others(_PARTS)
    own = quantization.get(module.files["weight"].removesuffix(".weight"))
    options = {**quantization, **own} if isinstance(own, Mapping) else quantization
    bits, group = options.get("bits"), options.get("group_size")
    if (mode := options.get("mode", "affine")) != "affine":
        raise module.fault(f"mode {mode!r} of MLX is unknown here; expected affine")
    if not isinstance(bits, int) or f"mlx{bits}" not in PUBLISHED or not isinstance(group, int) or group < 1:
        raise module.fault(f"bits {bits!r} and group_size {group!r} in the config are none of MLX's")
    if module.dtype("weight") is not torch.uint32 or len(module.shape("weight")) != 2:
        raise module.fault(f"expected a weight of uint32 [rows, words], found {module.dtype('weight')}")
    rows, words = module.shape("weight")
    cols = words * 32 // bits
    if words * 32 % bits or cols % group:
        raise module.fault(f"{words} words of {bits} bits are no whole groups of {group}")
    for part in ("scales", "biases"):
        if module.shape(part) != (rows, cols // group):
            raise module.fault(f"{part} are {list(module.shape(part))}, expected {[rows, cols // group]}")
    spec = WeightSpec(f"mlx{bits}", group)
    return StoredTensor((rows, cols), module.nbytes, spec, partial(_matrix, module, spec, cols, bits))


def _matrix(module: Module, spec: WeightSpec, cols: int, bits: int) -> PublishedMatrix:
    stored = {part: module.tensor(part) for part in _PARTS}
    stored["weight"] = as_bytes(stored["weight"])
    return PublishedMatrix(stored, cols, spec, partial(_decode, bits, cols))


def _decode(bits: int, cols: int, stored: Mapping[str, Tensor]) -> Tensor:
    scale, bias = stored["scales"].float(), stored["biases"].float()
    codes = BitPacking(bits).unpack(stored["weight"], cols).float().view(*scale.shape, -1)
    return (codes * scale.unsqueeze(2) + bias.unsqueeze(2)).view(len(codes), cols)
