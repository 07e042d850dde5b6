"""The method `gemma` of `transformers` (integrations/gemma_quant.py): integers of 2, 4 and 8 bits with scales of rows.

2 and 4 bits are offsets from the least value in uint8, the lowest bits first; 8 bits are int8 themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.published.folder import Module, as_bytes, modules, published
from epic_quant.published.matrix import PublishedMatrix
from epic_quant.published.source import PublishedFile, StoredTensor
from epic_quant.quant.bitpack import BitPacking
from epic_quant.spec import WeightSpec

METHOD = "gemma"

_ACTIVATIONS = ("input_activation_scale", "output_activation_scale")
# The names of codes and scales in a linear layer, and in an embedding.
_LINEAR, _EMBEDDING = ("weight", "weight_scale"), ("embedding_quantized", "embedding_scale")


def read(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> PublishedFile:
    """The text tensors of a folder whose config says so. Raises CheckpointError where they do not fit it."""
    found, _ = modules(checkpoint)
    rounds = any(bool(one.tensor(part).any()) for one in found.values() for part in _ACTIVATIONS if part in one)
    notes = ["engines round its activations to 8 bits, which is not measured here"] if rounds else []
    return published(checkpoint, METHOD, lambda module: _stored(module, quantization), notes)


def _stored(module: Module, quantization: Mapping[str, Any]) -> StoredTensor:
    parts = next((parts for parts in (_LINEAR, _EMBEDDING) if parts[1] in module), None)
    if parts is None:
        return module.plain()
    module.refuse_others((*parts, *_ACTIVATIONS))
    codes, scale = parts
    try:
        bits = _bits(module.files[scale].removesuffix(f".{scale}"), quantization)
    except (re.error, AttributeError, TypeError) as error:
        raise module.fault(f"module_quant_configs cannot be read: {error}") from error
    dtype = torch.int8 if bits == 8 else torch.uint8
    if bits not in (2, 4, 8) or module.dtype(codes) is not dtype or len(module.shape(codes)) != 2:
        found = f"{module.dtype(codes)} {list(module.shape(codes))}"
        raise module.fault(f"{codes} is {found}, by the config of {bits} bits; expected 2, 4 or 8")
    rows, nbytes = module.shape(codes)
    cols = nbytes * 8 // bits
    scales = module.scales(scale)
    if len(scales) != 2 or scales[0] != rows or not scales[1] or cols % scales[1]:
        raise module.fault(f"{scale} is {list(scales)}, which does not fit a matrix {[rows, cols]}")
    spec = WeightSpec(f"gemma_int{bits}", None if scales[1] == 1 else cols // scales[1])
    return StoredTensor((rows, cols), module.nbytes, spec, partial(_matrix, module, parts, spec, cols, bits))


def _bits(name: str, quantization: Mapping[str, Any]) -> Any:
    """A module's width: of the first pattern that is found in its name, or of all others."""
    patterns = quantization.get("module_quant_configs") or {}
    own = next((options for pattern, options in patterns.items() if re.search(pattern, name)), quantization)
    return own.get("num_bits", quantization.get("num_bits", 4))


def _matrix(module: Module, parts: tuple[str, str], spec: WeightSpec, cols: int, bits: int) -> PublishedMatrix:
    codes, scale = map(module.tensor, parts)
    return PublishedMatrix({"codes": as_bytes(codes), "scale": scale}, cols, spec, partial(_decode, bits, cols))


def _decode(bits: int, cols: int, stored: Mapping[str, Tensor]) -> Tensor:
    packed, scale = stored["codes"], stored["scale"].float()
    codes = (
        packed.view(torch.int8).float() if bits == 8 else BitPacking(bits).unpack(packed, cols) - float(1 << bits - 1)
    )
    decoded: Tensor = codes.view(*scale.shape, -1) * scale.unsqueeze(2)
    return decoded.view(len(packed), cols)
