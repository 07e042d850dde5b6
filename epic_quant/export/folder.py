"""A folder that `transformers` loads: config, tokenizer, and one .safetensors file with integer codes and scales."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epic_quant.checkpoint import DTYPES, Checkpoint
from epic_quant.export.output import progress, raw
from epic_quant.files import atomic, safetensors_writer, tensor_nbytes
from epic_quant.gemma4.tensors import TextTensor, text_tensors
from epic_quant.policy import PolicyWeights
from epic_quant.quant import StoredMatrix
from epic_quant.spec import PolicySpec, WeightSpec

# What lies beside the weights of a published model, and goes with them.
_COMPANIONS = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json",
)  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# How a module's name begins, in the file and in any class of `transformers` or vLLM that loads it.
_PREFIX = r"(model\.|language_model\.)*"


class Part(NamedTuple):
    """One of the tensors that stand for a matrix: its name after the module's, dtype, and shape."""

    name: str
    dtype: torch.dtype
    shape: Sequence[int]


class FolderFormat(ABC):
    """How a quantization method of `transformers` stores a matrix of integers, and what its config says of it."""

    @abstractmethod
    def candidates(self, tensor: TextTensor, spec: WeightSpec) -> Sequence[WeightSpec]:
        """As `holding.Candidates`."""

    @abstractmethod
    def parts(self, tensor: TextTensor, spec: WeightSpec) -> Sequence[Part]:
        """The codes, and then what goes with them, of a matrix in one of the candidates."""

    @abstractmethod
    def codes(self, piece: StoredMatrix) -> Tensor:
        """The codes of some rows, in the bytes that the file has."""

    @abstractmethod
    def others(self, tensor: TextTensor, scale: Tensor) -> Sequence[Tensor]:
        """The other parts; `scale` is fp16 [rows, groups]."""

    @abstractmethod
    def quantization_config(self, matrices: Sequence[tuple[TextTensor, WeightSpec | None]]) -> dict[str, Any]:
        """What config.json says, given all matrices with their specs; one of None stays as it is."""

    def write(self, checkpoint: Checkpoint, weights: PolicyWeights, policy: PolicySpec, out: Path) -> None:
        """Write the folder `out`, whole or not at all: unused tensors are left out, and what is no text is copied.

        Raises OSError.
        """
        names = {file_name: name for name, file_name in text_tensors(checkpoint, weights.config).items()}
        tensors = {file_name: weights.tensors.get(names.get(file_name, "")) for file_name in checkpoint.names}
        tensors = {file_name: tensor for file_name, tensor in tensors.items() if tensor is None or not tensor.unused}
        matrices = [(tensor, weights.spec_of(tensor.name)) for tensor in tensors.values() if tensor and tensor.target]
        config = checkpoint.config_json
        if any(spec for _, spec in matrices):
            config["quantization_config"] = self.quantization_config(matrices)
        layout = {
            name: (_NAMES[dtype], shape)
            for file_name, tensor in tensors.items()
            for name, dtype, shape in self._layout(checkpoint, weights, file_name, tensor)
        }
        with atomic(out) as unfinished:
            unfinished.mkdir()
            (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            folder = checkpoint.location(checkpoint.names[0]).path.parent
            for name in _COMPANIONS:
                path = checkpoint.tokenizer_path if name == "tokenizer.json" else folder / name
                if path is not None and path.is_file():
                    shutil.copyfile(path, unfinished / name)
            facts = {"format": "pt", "epic_quant.policy": str(policy)}
            with (
                safetensors_writer(unfinished / "model.safetensors", layout, facts) as write,
                progress(write, sum(starmap(tensor_nbytes, layout.values()))) as write_piece,
            ):
                for file_name, tensor in tensors.items():
                    for data in self._data(checkpoint, weights, file_name, tensor):
                        write_piece(raw(data))

    def _layout(
        self, checkpoint: Checkpoint, weights: PolicyWeights, file_name: str, tensor: TextTensor | None
    ) -> Iterator[Part]:
        """The tensors that stand for one of the checkpoint, by their whole names."""
        spec = None if tensor is None else weights.spec_of(tensor.name)
        if tensor is None or spec is None:
            yield Part(file_name, checkpoint.dtype(file_name), checkpoint.shape(file_name))
            return
        for part in self.parts(tensor, spec):
            yield part._replace(name=f"{file_name.removesuffix('weight')}{part.name}")

    def _data(
        self, checkpoint: Checkpoint, weights: PolicyWeights, file_name: str, tensor: TextTensor | None
    ) -> Iterator[Tensor]:
        """What is written of one tensor of the checkpoint, in the order of `_layout`."""
        if tensor is None or weights.spec_of(tensor.name) is None:
            yield checkpoint.tensor(file_name)
            return
        scales = []  # The codes come first; these are few.
        for piece in weights.pieces(tensor.name):
            assert isinstance(piece, StoredMatrix)
            yield self.codes(piece)
            scales.append(piece.tensors()["scale"])
        yield from self.others(tensor, torch.cat(scales))


def module_patterns(tensors: Sequence[TextTensor]) -> list[str]:
    """Regular expressions of the modules of some tensors, under whatever prefix: one for each kind."""
    layers: dict[str, list[str]] = {}
    for tensor in tensors:
        local = tensor.local_name.removesuffix(".weight").replace(".", r"\.")
        if tensor.layer is None:
            layers[f"^{_PREFIX}{local}$"] = []
        else:
            layers.setdefault(rf"^{_PREFIX}layers\.(LAYERS)\.{local}$", []).append(str(tensor.layer))
    return [pattern.replace("LAYERS", "|".join(numbers)) for pattern, numbers in layers.items()]
