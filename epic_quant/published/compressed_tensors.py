"""compressed-tensors, of vLLM and llm-compressor: integers packed into int32, int8, or float8, with scales.

Packed codes are offsets from the least value, the lowest bit first (compressed_tensors/compressors/pack_quantized).
Older releases begin a code that does not fit into an int32 in the next one, newer ones go on across it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, unknown
from epic_quant.published.folder import Module, as_bytes, published
from epic_quant.published.matrix import PublishedMatrix
from epic_quant.published.source import PublishedFile, StoredTensor
from epic_quant.quant.bitpack import BitPacking
from epic_quant.spec import WeightSpec

METHOD = "compressed-tensors"

_FORMATS = ("dense", "float-quantized", "int-quantized", "mixed-precision", "naive-quantized", "pack-quantized")
_COMMON = ("weight_scale", "weight_zero_point", "weight_g_idx")
# What codes cannot be decoded without, by the values of an option that say so.
_NEEDED: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "weight_zero_point": ("symmetric", (False,)),
    "weight_g_idx": ("actorder", ("group", "dynamic")),
}
# Scales of activations, K and V, which belong to no weight.
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale")


def read(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> PublishedFile:
    """The text tensors of a folder whose config says so. Raises CheckpointError for what is unknown or does not fit."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise CheckpointError(f"{checkpoint.source}: its quantization_config lacks config_groups")
    for one in (quantization, *groups.values()):
        if (name := one.get("format")) is not None and name not in _FORMATS:
            raise CheckpointError(f"{checkpoint.source}: {unknown(f'format of {METHOD}', str(name), _FORMATS)}")
    for key in ("sparsity_config", "transform_config"):
        if quantization.get(key):
            raise CheckpointError(f"{checkpoint.source}: {key} is unknown here; expected plain quantized weights")
    schemes = [scheme for group in groups.values() if isinstance(scheme := group.get("weights"), Mapping)]
    widths: list[Any] = [scheme.get("num_bits") for scheme in schemes]
    if not widths or not all(isinstance(bits, int) and 2 <= bits <= 8 for bits in widths):
        raise CheckpointError(f"{checkpoint.source}: num_bits in its config are {widths}; expected 2 to 8")
    blocks = {_block_of(checkpoint, scheme) for scheme in schemes if scheme.get("strategy") == "block"}
    needed = [part for part, (key, values) in _NEEDED.items() if all(scheme.get(key) in values for scheme in schemes)]
    notes = []
    if any(group.get("input_activations") for group in groups.values()):
        notes.append("engines quantize its activations too, which is not measured here")
    if quantization.get("kv_cache_scheme"):
        notes.append("engines quantize K and V too, which is not measured here unless kv=… says so")
    return published(checkpoint, METHOD, lambda module: _stored(module, {*widths}, blocks, needed), notes)


def _block_of(checkpoint: Checkpoint, scheme: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    match scheme.get("block_structure"):
        case [int(rows), int(cols)] if rows > 0 and cols > 0:
            return rows, cols
        case other:
            raise CheckpointError(f"{checkpoint.source}: block_structure is {other!r}; expected [rows, columns]")


def _stored(module: Module, widths: set[int], blocks: set[tuple[int, int]], needed: Iterable[str]) -> StoredTensor:
    if "weight_packed" not in module and "weight_scale" not in module:
        return module.plain()
    for part in needed:
        module.shape(part)  # raises where it is missing
    if "weight_packed" in module:
        return _packed(module, widths)
    module.refuse_others(("weight", *_COMMON, *_ACTIVATIONS))
    dtype = module.dtype("weight")
    if dtype not in (torch.int8, torch.float8_e4m3fn) or len(module.shape("weight")) != 2:
        raise module.fault(f"expected a weight of int8 or float8_e4m3fn, found {dtype}")
    rows, cols = module.shape("weight")
    fitting = [block for block in blocks if module.scales("weight_scale") == _num_blocks((rows, cols), block)]
    if fitting and dtype is torch.float8_e4m3fn:
        if len(fitting) > 1:
            raise module.fault(f"weight_scale fits more than one block_structure of the config: {fitting}")
        module.refuse_others(("weight", "weight_scale", *_ACTIVATIONS))
        spec = WeightSpec("ct_float8_block", fitting[0][1])
        return StoredTensor((rows, cols), module.nbytes, spec, partial(_block_codes, module, spec, fitting[0]))
    asymmetric = "weight_zero_point" in module
    if asymmetric and module.shape("weight_zero_point") != module.shape("weight_scale"):
        raise module.fault(f"weight_zero_point is {list(module.shape('weight_zero_point'))}, which does not fit")
    name = "ct_float8" if dtype is not torch.int8 else f"ct_{'u' if asymmetric else ''}int{max(widths)}"
    spec = WeightSpec(name, _group(module, rows, cols))
    return StoredTensor((rows, cols), module.nbytes, spec, partial(_plain_codes, module, spec, cols))


def _packed(module: Module, widths: set[int]) -> StoredTensor:
    module.refuse_others(("weight_packed", "weight_shape", *_COMMON, *_ACTIVATIONS))
    is_shape = module.shape("weight_shape") == (2,) and module.dtype("weight_shape") in (torch.int32, torch.int64)
    if module.dtype("weight_packed") is not torch.int32 or not is_shape:
        raise module.fault("expected weight_packed of int32 and weight_shape of 2 integers")
    rows, cols = (int(size) for size in module.tensor("weight_shape"))
    fitting = [bits for bits in widths if module.shape("weight_packed") in [(rows, n) for n in _words(cols, bits)]]
    if len(fitting) != 1:
        raise module.fault(
            f"weight_packed is {list(module.shape('weight_packed'))} for a matrix {[rows, cols]}, which "
            f"{'does not fit' if not fitting else 'fits more than one of'} the config's {sorted(widths)} bits"
        )
    (bits,) = fitting
    group = _group(module, rows, cols)
    asymmetric = "weight_zero_point" in module
    if asymmetric:
        columns = module.shape("weight_scale")[-1] if len(module.shape("weight_scale")) == 2 else 1
        if module.shape("weight_zero_point") not in [(n, columns) for n in _words(rows, bits)]:
            raise module.fault(f"weight_zero_point is {list(module.shape('weight_zero_point'))}, which does not fit")
    spec = WeightSpec(f"ct_{'u' if asymmetric else ''}int{bits}", group)
    return StoredTensor((rows, cols), module.nbytes, spec, partial(_packed_codes, module, spec, (rows, cols), bits))


def _words(count: int, bits: int) -> tuple[int, int]:
    """The int32 that so many codes take: across their borders, and not."""
    return math.ceil(count * bits / 32), math.ceil(count / (32 // bits))


def _group(module: Module, rows: int, cols: int) -> int | None:
    """Weights that share a scale; None where a row, or the matrix, has one. Raises where scales do not fit."""
    shape = module.scales("weight_scale")
    if math.prod(shape) == 1 or shape in ((rows,), (rows, 1)):
        return None
    if len(shape) == 2 and shape[0] == rows and shape[1] and cols % shape[1] == 0:
        return cols // shape[1]
    raise module.fault(f"weight_scale is {list(shape)}, which does not fit a matrix {[rows, cols]}")


def _by_row(values: Tensor, rows: int) -> Tensor:
    """Scales or zero points as [rows, groups]."""
    return values.reshape(1, 1).expand(rows, 1) if values.numel() == 1 else values.reshape(rows, -1)


def _plain_codes(module: Module, spec: WeightSpec, cols: int) -> PublishedMatrix:
    weight = module.tensor("weight")
    stored = {"codes": as_bytes(weight), "scale": _by_row(module.tensor("weight_scale"), len(weight))}
    if "weight_zero_point" in module:
        stored["zero_point"] = _by_row(module.tensor("weight_zero_point"), len(weight))
    return PublishedMatrix(stored, cols, spec, partial(_decode, partial(_viewed, weight.dtype), _columns(module, cols)))


def _num_blocks(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """The last ones in a row or column may be smaller."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def _block_codes(module: Module, spec: WeightSpec, block: tuple[int, int]) -> PublishedMatrix:
    weight = module.tensor("weight")
    row_block, col_block = (torch.arange(size) // width for size, width in zip(weight.shape, block, strict=True))
    stored = {"codes": as_bytes(weight), "scale": module.tensor("weight_scale")[row_block]}
    return PublishedMatrix(stored, len(col_block), spec, partial(_decode, partial(_viewed, weight.dtype), col_block))


def _packed_codes(module: Module, spec: WeightSpec, shape: tuple[int, int], bits: int) -> PublishedMatrix:
    rows, cols = shape
    scale = _by_row(module.tensor("weight_scale"), rows)
    stored = {"codes": as_bytes(module.tensor("weight_packed")), "scale": scale}
    if "weight_zero_point" in module:
        packed = as_bytes(module.tensor("weight_zero_point").T)
        stored["zero_point"] = _signed(bits, rows, packed).T.contiguous()
    codes = partial(_signed, bits, cols)
    return PublishedMatrix(stored, cols, spec, partial(_decode, codes, _columns(module, cols)))


def _columns(module: Module, cols: int) -> Tensor | None:
    """The group of each column, where columns were sorted by their importance first."""
    if "weight_g_idx" not in module:
        return None
    index = module.tensor("weight_g_idx").long()
    if (index == -1).all():  # Columns were not sorted.
        return None
    if index.shape != (cols,) or (index < 0).any() or index.max() >= module.shape("weight_scale")[-1]:
        raise module.fault(f"weight_g_idx names no group for each of {cols} columns")
    return index


def _viewed(dtype: torch.dtype, codes: Tensor) -> Tensor:
    return codes.view(dtype).float()


def _signed(bits: int, cols: int, codes: Tensor) -> Tensor:
    return _unpacked(bits, cols, codes) - (1 << bits - 1)


def _unpacked(bits: int, count: int, packed: Tensor) -> Tensor:
    """[n, bytes] uint8 of whole int32 to [n, count] fp32, offsets from the least value."""
    across, _ = _words(count, bits)
    if packed.shape[1] == 4 * across:
        return BitPacking(bits).unpack(packed, count).float()
    words = packed.contiguous().view(torch.int32).unsqueeze(2)
    codes: Tensor = words >> torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32) & (1 << bits) - 1
    return codes.flatten(1)[:, :count].float()


def _decode(codes_of: Callable[[Tensor], Tensor], columns: Tensor | None, stored: Mapping[str, Tensor]) -> Tensor:
    codes = codes_of(stored["codes"])
    scale = stored["scale"].float()
    zero = stored["zero_point"].float() if "zero_point" in stored else torch.zeros_like(scale)
    decoded: Tensor
    if columns is None:
        decoded = (codes.view(*scale.shape, -1) - zero.unsqueeze(2)) * scale.unsqueeze(2)
    else:
        decoded = (codes - zero[:, columns]) * scale[:, columns]
    return decoded.view(codes.shape)
