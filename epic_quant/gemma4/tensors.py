"""The tensors of the text model: their canonical names, classes and shapes, and where a file has them.

A canonical name carries no prefix: `layers.0.self_attn.q_proj.weight`, `embed_tokens.weight`, `norm.weight`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from epic_quant.checkpoint import Checkpoint, dtype_name
from epic_quant.errors import CheckpointError, ConfigError
from epic_quant.gemma4.config import LayerSpec, TextConfig
from epic_quant.spec import KINDS, Target, TensorClass


@dataclass(frozen=True)
class TextTensor:
    """A tensor that the config says the text model has."""

    name: str  # canonical
    layer: int | None  # None for a global
    tensor_class: TensorClass | None  # None for norms and scalars, which stay as they are
    shape: tuple[int, ...]
    unused: bool = False  # K and V weights of a layer that reads another's: never used, and not in every file

    @property
    def local_name(self) -> str:
        """The name inside its layer (`self_attn.q_proj.weight`); a global's whole name."""
        return self.name if self.layer is None else self.name.removeprefix(f"layers.{self.layer}.")

    @property
    def target(self) -> Target | None:
        """What a policy knows it by; None for norms and scalars."""
        if self.tensor_class is None:
            return None
        kind = self.name.removesuffix(".weight").rpartition(".")[2] if KINDS[self.tensor_class] else None
        return Target(self.tensor_class, kind, self.layer)


def expected_tensors(config: TextConfig) -> tuple[TextTensor, ...]:
    """All tensors of the text model, from the config alone, unused ones included: globals, then layer by layer."""
    return (*_globals(config), *(tensor for spec in config.layers for tensor in _layer(config, spec)))


def text_tensors(checkpoint: Checkpoint, config: TextConfig) -> Mapping[str, str]:
    """The text model's tensors in a file: canonical name to the name in the file, unused ones only where it has them.

    Vision and audio towers are not text and are left out, and so is a head that equals the embedding, to which this
    model's head is tied. Raises CheckpointError where a tensor is missing or is there twice, where the head differs
    from the embedding, where a weight is quantized, and on any other tensor, by name; ConfigError where one has another
    shape than the config says, or belongs to a layer that the config does not have.
    """
    expected = {tensor.name: tensor for tensor in expected_tensors(config)}
    found: dict[str, str] = {}
    others: dict[str, str] = {}
    for file_name in checkpoint.names:
        name = without_prefix(file_name)
        if name in found:
            raise CheckpointError(f"{checkpoint.source}: {found[name]} and {file_name} are the same tensor")
        if name in expected:
            found[name] = file_name
        elif not name.startswith(_TOWERS):
            others[name] = file_name
    _check_others(checkpoint, expected, found, others)
    for name, tensor in expected.items():
        if name not in found:
            if not tensor.unused:
                raise CheckpointError(f"{checkpoint.source}: no tensor {name}")
            continue
        if (dtype := checkpoint.dtype(found[name])) not in FLOATS:
            raise CheckpointError(f"{checkpoint.source}: {found[name]} is stored as {dtype_name(dtype)}; {PLAIN}")
        if (shape := tuple(checkpoint.shape(found[name]))) != tensor.shape:
            raise ConfigError(
                f"{checkpoint.source}: {found[name]} is {list(shape)}, but the config makes it {list(tensor.shape)}"
            )
    return found


def is_head(file_name: str) -> bool:
    """Whether this tensor of a file is a head of its own; in a file that `text_tensors` took, it is the embedding."""
    return without_prefix(file_name) == _HEAD


def without_prefix(file_name: str) -> str:
    """A tensor's name without what the class that saved it puts in front."""
    return _PREFIX.sub("", _WRAPPERS.sub("", file_name))


# What the weights of the model that others are measured against may be stored in.
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# The multimodal class writes `model.language_model.layers…`, the text-only one `model.layers…`; others have neither.
# PEFT puts its own before, and so do data-parallel training and torch.compile, which also wrap modules inside.
_PREFIX = re.compile(r"^((base_model|model|language_model)\.)*")
_WRAPPERS = re.compile(r"\b(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_TOWERS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
PLAIN = "expected plain weights in bf16, fp16, fp32 or fp64, neither quantized nor with an adapter or a bias beside"
_COMPARED_ROWS = 512


def _check_others(
    checkpoint: Checkpoint, expected: Mapping[str, TextTensor], found: Mapping[str, str], others: Mapping[str, str]
) -> None:
    """Refuse what is neither an expected tensor nor a tower's; names are canonical names and those in the file."""
    stems = {name.removesuffix(".weight") for name in expected}
    for name, file_name in others.items():
        if name == _HEAD:
            _check_head(checkpoint, file_name, found.get(_EMBEDDING))
            continue
        # Formats of quantized weights write `….weight_scale`, `….qweight` and the like; adapters `….lora_A.weight`.
        parts = name.split(".")
        if any(".".join(parts[:count]) in stems for count in range(1, len(parts))):
            raise CheckpointError(f"{checkpoint.source}: has {file_name}; {PLAIN}")
        if name.startswith("layers."):
            raise ConfigError(f"{checkpoint.source}: the config has no tensor {name}, but the file has {file_name}")
        missing = next((one for one, tensor in expected.items() if one not in found and not tensor.unused), None)
        if missing is not None:
            near = difflib.get_close_matches(missing, others.values(), n=1, cutoff=0.0)
            raise CheckpointError(f"{checkpoint.source}: no tensor {missing}; the nearest that it has is {near[0]}")
        raise CheckpointError(f"{checkpoint.source}: {file_name} is no tensor of Gemma 4's text model or of its towers")


# A run makes the weights of every policy of one checkpoint, and the two take a read of 2.7 GB on E4B.
@lru_cache(maxsize=1)
def _check_head(checkpoint: Checkpoint, head: str, embedding: str | None) -> None:
    if embedding is None:
        return
    mine, other = checkpoint.tensor(head), checkpoint.tensor(embedding)
    if mine.shape != other.shape or not all(
        # In fp64, as one may be stored in another dtype.
        torch.equal(some.double(), others.double())
        for some, others in zip(mine.split(_COMPARED_ROWS), other.split(_COMPARED_ROWS), strict=True)
    ):
        raise CheckpointError(
            f"{checkpoint.source}: {head} differs from {embedding}, but this model's head is tied to its embedding"
        )


def _globals(config: TextConfig) -> Iterator[TextTensor]:
    hidden, packed = config.hidden_size, config.num_layers * config.ple_dim
    yield TextTensor("embed_tokens.weight", None, TensorClass.EMBEDDING, (config.vocab_size, hidden))
    if config.ple_dim:
        table = (config.ple_vocab_size, packed)
        yield TextTensor("embed_tokens_per_layer.weight", None, TensorClass.PLE_TABLE, table)
        yield TextTensor("per_layer_model_projection.weight", None, TensorClass.PLE_MODEL_PROJECTION, (packed, hidden))
        yield TextTensor("per_layer_projection_norm.weight", None, None, (config.ple_dim,))
    yield TextTensor("norm.weight", None, None, (hidden,))


def _layer(config: TextConfig, spec: LayerSpec) -> Iterator[TextTensor]:
    hidden, wide, ple = config.hidden_size, spec.mlp.intermediate_size, config.ple_dim
    q, kv = spec.attention.num_heads * spec.attention.head_dim, spec.attention.num_kv_heads * spec.attention.head_dim
    attention = TensorClass(spec.layer_type)

    def tensor(name: str, tensor_class: TensorClass | None, *shape: int, unused: bool = False) -> TextTensor:
        return TextTensor(f"layers.{spec.index}.{name}", spec.index, tensor_class, shape, unused)

    yield tensor("input_layernorm.weight", None, hidden)
    yield tensor("self_attn.q_proj.weight", attention, q, hidden)
    yield tensor("self_attn.k_proj.weight", attention, kv, hidden, unused=not spec.is_kv_source)
    yield tensor("self_attn.v_proj.weight", attention, kv, hidden, unused=not spec.is_kv_source)
    yield tensor("self_attn.o_proj.weight", attention, hidden, q)
    yield tensor("self_attn.q_norm.weight", None, spec.attention.head_dim)
    yield tensor("self_attn.k_norm.weight", None, spec.attention.head_dim, unused=not spec.is_kv_source)
    yield tensor("post_attention_layernorm.weight", None, hidden)
    yield tensor("pre_feedforward_layernorm.weight", None, hidden)
    yield tensor("mlp.gate_proj.weight", TensorClass.MLP, wide, hidden)
    yield tensor("mlp.up_proj.weight", TensorClass.MLP, wide, hidden)
    yield tensor("mlp.down_proj.weight", TensorClass.MLP, hidden, wide)
    yield tensor("post_feedforward_layernorm.weight", None, hidden)
    if ple:
        yield tensor("per_layer_input_gate.weight", TensorClass.PLE_PROJECTIONS, ple, hidden)
        yield tensor("per_layer_projection.weight", TensorClass.PLE_PROJECTIONS, hidden, ple)
        yield tensor("post_per_layer_input_norm.weight", None, hidden)
    yield tensor("layer_scalar", None, 1)
