"""What formats in .safetensors files share: the tensors that stand for each module, by their part of its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.gguf_metadata import metadata
from epic_quant.gemma4.tensors import without_prefix
from epic_quant.published.source import PublishedFile, StoredTensor, one_to_one
from epic_quant.spec import WeightSpec

_TEXT = re.compile(
    r"(layers\.\d+\..+|embed_tokens|embed_tokens_per_layer|per_layer_model_projection|per_layer_projection_norm|norm)"
    r"\.([^.]+)"
)
# Scales of Q, K and V, which no module of their own has.
_KV_SCALE = re.compile(r"layers\.\d+\.self_attn\.[qkv]_scale")
_SCALAR = re.compile(r"(layers\.\d+)\.layer_scalar")
_PLAIN = {torch.bfloat16: WeightSpec("bf16"), torch.float16: WeightSpec("f16"), torch.float32: WeightSpec("f32")}


@dataclass(frozen=True)
class Module:
    """The tensors of one module, by the last part of their names."""

    checkpoint: Checkpoint
    name: str
    files: Mapping[str, str]

    def __contains__(self, part: str) -> bool:
        return part in self.files

    def shape(self, part: str) -> tuple[int, ...]:
        """The shape of a part."""
        return self.checkpoint.shape(self._name(part))

    def scales(self, part: str) -> tuple[int, ...]:
        """The shape of a part of floats; others are exponents, or codes themselves."""
        if self.dtype(part) not in _PLAIN:
            raise self.fault(f"{part} is {self.dtype(part)}; expected floats of 16 or 32 bits")
        return self.shape(part)

    def dtype(self, part: str) -> torch.dtype:
        """The dtype of a part."""
        return self.checkpoint.dtype(self._name(part))

    def tensor(self, part: str) -> Tensor:
        """A part, mapped."""
        return self.checkpoint.tensor(self._name(part))

    def fault(self, message: str) -> CheckpointError:
        """An error of this module, in one line."""
        return CheckpointError(f"{self.checkpoint.source}: {self.name}: {message}")

    def refuse_others(self, known: Iterable[str]) -> None:
        """Raise CheckpointError where it has a part that is unknown here, and so would be left out of its weights."""
        if strange := sorted(self.files.keys() - set(known)):
            raise self.fault(f"unknown part {strange[0]!r} of a quantized matrix; expected {', '.join(known)}")

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts."""
        return sum(map(self.checkpoint.nbytes, self.files.values()))

    def plain(self) -> StoredTensor:
        """What it is where it is not quantized: one tensor of floats."""
        if set(self.files) != {"weight"} or self.dtype("weight") not in _PLAIN:
            raise self.fault(f"expected a weight of floats, found {', '.join(sorted(self.files))}")
        spec = _PLAIN[self.dtype("weight")]
        return StoredTensor(self.shape("weight"), self.nbytes, spec, lambda: self.tensor("weight"))

    def _name(self, part: str) -> str:
        if part not in self.files:
            raise self.fault(f"no {part}; expected it beside {', '.join(sorted(self.files))}")
        return self.files[part]


def modules(checkpoint: Checkpoint) -> tuple[dict[str, Module], tuple[str, ...]]:
    """The text modules by the canonical name of their weight, and the names of all other tensors."""
    files = one_to_one(((without_prefix(name), name) for name in checkpoint.names), checkpoint.source)
    parts: dict[str, dict[str, str]] = {}
    others = []
    for name, file_name in files.items():
        if _SCALAR.fullmatch(name):
            parts[name] = {"weight": file_name}
        elif (match := _TEXT.fullmatch(name)) and not _KV_SCALE.fullmatch(name):
            parts.setdefault(f"{match[1]}.weight", {})[match[2]] = file_name
        else:
            others.append(file_name)
    return {name: Module(checkpoint, name, found) for name, found in parts.items()}, tuple(sorted(others))


def published(
    checkpoint: Checkpoint, kind: str, stored: Callable[[Module], StoredTensor], notes: Iterable[str] = ()
) -> PublishedFile:
    """A folder whose modules are each `stored` so. Raises ConfigError where its config is not Gemma 4's."""
    found, others = modules(checkpoint)
    return PublishedFile(
        source=checkpoint.source,
        kind=kind,
        files=tuple({checkpoint.location(name).path for name in checkpoint.names}),
        tensors={name: stored(module) for name, module in found.items()},
        others=others,
        metadata=metadata(TextConfig.read(checkpoint, quantized=True)),
        notes=tuple(notes),
    )


def as_bytes(tensor: Tensor) -> Tensor:
    """A matrix [rows, n] of integers or float8 as its bytes [rows, row bytes] uint8."""
    return tensor.contiguous().view(torch.uint8)
