"""The method `gemma` of `transformers`: integers of 2, 4 and 8 bits with a scale for each row.

Its layers (`transformers.integrations.gemma_quant`) hold the offset from the least value, the first code in the lowest
bits of a byte, as this project packs it, but 8 bits as int8 themselves. Activations are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epic_quant.export.folder import FolderFormat, Part, module_patterns
from epic_quant.gemma4.tensors import TextTensor
from epic_quant.quant import StoredMatrix
from epic_quant.spec import BF16, TensorClass, WeightSpec

_BITS = {"int8": 8, "int4": 4, "int2": 2}


class Gemma(FolderFormat):
    """`weight` [rows, cols · bits / 8], `weight_scale` fp32 [rows, 1]; of a table `embedding_quantized`, `…_scale`."""

    def candidates(self, tensor: TextTensor, spec: WeightSpec) -> Sequence[WeightSpec]:
        """int2, int4 and int8 with one scale a row, and bf16; the embedding, to which the head is tied, is bf16."""
        if tensor.tensor_class is TensorClass.EMBEDDING:
            return (BF16,)
        # A group that is a whole row is no other storage.
        group = spec.group_size if spec.info.has_groups and spec.group_of(tensor.shape[1]) == tensor.shape[1] else None
        return *(WeightSpec(name, group, gptq=spec.gptq, yaqa=spec.yaqa) for name in _BITS), BF16

    def parts(self, tensor: TextTensor, spec: WeightSpec) -> Sequence[Part]:
        """As in the class."""
        rows, cols = tensor.shape
        bits = _BITS[spec.format]
        dtype, row_nbytes = torch.int8 if bits == 8 else torch.uint8, -(-cols * bits // 8)
        codes, scale, *activations = _names(tensor)
        return (
            Part(codes, dtype, (rows, row_nbytes)),
            Part(scale, torch.float32, (rows, 1)),
            *(Part(name, torch.float32, ()) for name in activations),
        )

    def codes(self, piece: StoredMatrix) -> Tensor:
        """The bytes as they are packed, or int8: there, the offset of 128 is the sign bit."""
        packed = piece.tensors()["packed"]
        return packed ^ 128 if piece.spec.format == "int8" else packed

    def others(self, tensor: TextTensor, scale: Tensor) -> Sequence[Tensor]:
        """Scales of weights, and the zeros that stand for activations as they are."""
        return scale.float(), *(torch.zeros(()) for _ in _names(tensor)[2:])

    def quantization_config(self, matrices: Sequence[tuple[TextTensor, WeightSpec | None]]) -> dict[str, Any]:
        """The width of every module, and those that are left."""
        of_bits: dict[int, list[TextTensor]] = {}
        for tensor, spec in matrices:
            of_bits.setdefault(0 if spec is None else _BITS[spec.format], []).append(tensor)
        left = of_bits.pop(0, [])
        return {
            "quant_method": "gemma",
            "quantize_embeddings": True,
            "module_quant_configs": {
                pattern: {"num_bits": bits} for bits, tensors in of_bits.items() for pattern in module_patterns(tensors)
            },
            "modules_to_not_convert": ["lm_head", r".*(vision|audio).*", *module_patterns(left)],
        }


def _names(tensor: TextTensor) -> tuple[str, ...]:
    """Of the codes, their scales, and of what else a module has."""
    if tensor.tensor_class is TensorClass.PLE_TABLE:
        return "embedding_quantized", "embedding_scale"
    return "weight", "weight_scale", "input_activation_scale", "output_activation_scale"
