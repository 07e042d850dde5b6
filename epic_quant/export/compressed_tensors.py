"""compressed-tensors: symmetric integers of 4 and 8 bits with groups, `pack-quantized`, for vLLM and `transformers`.

A config group has the matrices of one width and group; all others are ignored. Codes lie in int32, the first in the
lowest bits, as the offset from the least value: the bytes that this project packs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epic_quant.export.folder import FolderFormat, Part, module_patterns
from epic_quant.gemma4.tensors import TextTensor
from epic_quant.quant import StoredMatrix
from epic_quant.spec import BF16, TensorClass, WeightSpec

_BITS = {"int4": 4, "int8": 8}
# The group that stands for the blocks of formats that have no groups.
_GROUP = 32
# The head is tied to the embedding, and engines look both tables up in plain rows.
_TABLES = (TensorClass.EMBEDDING, TensorClass.PLE_TABLE)
# Modules that are no part of the text model.
_NO_TEXT = [r"re:.*(vision|audio).*", "lm_head"]


class CompressedTensors(FolderFormat):
    """`weight_packed` int32 [rows, cols · bits / 32], `weight_scale` fp16 [rows, groups], `weight_shape` int64 [2]."""

    def candidates(self, tensor: TextTensor, spec: WeightSpec) -> Sequence[WeightSpec]:
        """int4 and int8 with the spec's own group where whole int32 hold a row, and bf16; tables are bf16 alone."""
        cols = tensor.shape[1]
        if tensor.tensor_class in _TABLES:
            return (BF16,)
        group = spec.group_size if spec.info.has_groups else _GROUP
        widths = [name for name, bits in _BITS.items() if cols * bits % 32 == 0]
        found = [WeightSpec(name, group, gptq=spec.gptq, yaqa=spec.yaqa).with_dividing_group([cols]) for name in widths]
        return *(one for one in found if one is not None), BF16

    def parts(self, tensor: TextTensor, spec: WeightSpec) -> Sequence[Part]:
        """As in the class."""
        rows, cols = tensor.shape
        return (
            Part("weight_packed", torch.int32, (rows, cols * _BITS[spec.format] // 32)),
            Part("weight_scale", torch.float16, (rows, cols // spec.group_of(cols))),
            Part("weight_shape", torch.int64, (2,)),
        )

    def codes(self, piece: StoredMatrix) -> Tensor:
        """The bytes as they are packed."""
        return piece.tensors()["packed"]

    def others(self, tensor: TextTensor, scale: Tensor) -> Sequence[Tensor]:
        """Scales and shape."""
        return scale, torch.tensor(tensor.shape)

    def quantization_config(self, matrices: Sequence[tuple[TextTensor, WeightSpec | None]]) -> dict[str, Any]:
        """Its config groups, one for each width and group, and what they leave out."""
        by_arguments: dict[str, list[TextTensor]] = {}
        ignored = []
        for tensor, spec in matrices:
            if spec is None:
                ignored.append(tensor)
            else:
                by_arguments.setdefault(json.dumps(_arguments(tensor, spec)), []).append(tensor)
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{index}": {"targets": _modules(tensors), "weights": json.loads(arguments)}
                for index, (arguments, tensors) in enumerate(by_arguments.items())
            },
            "ignore": [*_NO_TEXT, *_modules(ignored)],
        }


def _arguments(tensor: TextTensor, spec: WeightSpec) -> dict[str, Any]:
    group = spec.group_of(tensor.shape[1])
    is_row = group == tensor.shape[1]
    return {
        "num_bits": _BITS[spec.format],
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if is_row else "group",
        "group_size": None if is_row else group,
        "dynamic": False,
    }


def _modules(tensors: Sequence[TextTensor]) -> list[str]:
    return [f"re:{pattern}" for pattern in module_patterns(tensors)]
