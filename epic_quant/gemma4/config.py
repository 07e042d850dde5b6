"""The text config of a Gemma 4 checkpoint, resolved to one `LayerSpec` a layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Rope:
    """RoPE: the frequencies that rotate a head's dims with position."""

    theta: float
    rotated_pairs: int  # of the head's head_dim / 2 frequency pairs, the first so many rotate with position
    factor: float = 1.0  # divides every frequency


@dataclass(frozen=True)
class GroupedQueryAttention:
    """Attention in which groups of query heads share a KV head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None  # keys a token sees, itself included; None on full layers
    rope: Rope


@dataclass(frozen=True)
class DenseMLP:
    """A gated MLP that every token goes through."""

    intermediate_size: int


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: its attention and MLP, and the source of its K and V."""

    index: int
    layer_type: str  # "sliding_attention" or "full_attention"
    attention: GroupedQueryAttention
    mlp: DenseMLP
    kv_source: int  # the layer whose K and V it reads; its own index if it computes them

    @property
    def is_kv_source(self) -> bool:
        """Whether the layer computes K and V of its own."""
        return self.kv_source == self.index


@dataclass(frozen=True)
class TextConfig:
    """The part of a config that the text model's math needs."""

    vocab_size: int
    hidden_size: int
    ple_dim: int  # width of a layer's slice of the per-layer embedding; 0 where the model has none
    ple_vocab_size: int  # rows of that table; 0 where there is none
    rms_norm_eps: float
    final_logit_softcapping: float | None
    max_position_embeddings: int
    bos_token_id: int
    layers: tuple[LayerSpec, ...]

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.layers)

    @classmethod
    def read(cls, checkpoint: Checkpoint, *, quantized: bool = False) -> TextConfig:
        """The config of a checkpoint. Raises ConfigError, naming the checkpoint, as `from_json` does."""
        config = checkpoint.config_json
        try:
            return cls.from_json(config, quantized=quantized)
        except ConfigError as error:
            raise ConfigError(f"{checkpoint.source}: {error}") from error

    @classmethod
    def from_json(cls, config: Mapping[str, Any], *, quantized: bool = False) -> TextConfig:
        """Read a `config.json`, of the multimodal or the text-only class, in its published or its current form.

        A field that is absent has `transformers`' default. What says that the weights are quantized is refused, unless
        they may be. Raises ConfigError, one line, where it is not Gemma 4, a
        field is not what it must be, or an unsupported feature is needed.
        """
        text = _Fields({**_DEFAULTS, **_text_part(config)})
        if not quantized:
            _reject_quantized(config, text)
        _reject_unsupported(config, text)
        ple_dim = text.integer("hidden_size_per_layer_input", least=0)
        return cls(
            vocab_size=text.integer("vocab_size"),
            hidden_size=text.integer("hidden_size"),
            ple_dim=ple_dim,
            ple_vocab_size=text.integer("vocab_size_per_layer_input") if ple_dim else 0,
            rms_norm_eps=text.number("rms_norm_eps"),
            final_logit_softcapping=text.number("final_logit_softcapping")
            if "final_logit_softcapping" in text
            else None,
            max_position_embeddings=text.integer("max_position_embeddings"),
            bos_token_id=text.integer("bos_token_id", least=0),
            layers=_layers(text),
        )


# Those of `transformers`' Gemma4TextConfig, without those that are None or that it derives from others.
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 2,
    "sliding_window": 512,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
}
_DEFAULT_GLOBAL_HEAD_DIM = 512
_DEFAULT_ROPE: Mapping[str, Any] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
# By default every sixth layer is a full one.
_DEFAULT_PATTERN = 6

# More than any model has: a wild number must not become wild memory.
_MOST_LAYERS = 10_000
_LARGEST_NUMBER = 1e30


class _Fields:
    """A JSON object whose fields are checked as they are read; `path` is where it stands in the config."""

    def __init__(self, json: Any, path: str = "") -> None:
        if not isinstance(json, Mapping):
            raise ConfigError(f"config field {path.rstrip('.')} is {json!r}; expected an object")
        self._json, self._path = json, path

    @property
    def names(self) -> list[str]:
        return list(self._json)

    def __contains__(self, name: str) -> bool:
        return self._json.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        """An optional field, None where it is absent."""
        return self._json.get(name)

    def object(self, name: str) -> _Fields:
        return _Fields(self._required(name), f"{self._path}{name}.")

    def integer(self, name: str, least: int = 1, most: float = _LARGEST_NUMBER) -> int:
        value = self._required(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            above = "" if most == _LARGEST_NUMBER else f" and at most {most}"
            raise ConfigError(f"{self._said(name)}; expected an integer of at least {least}{above}")
        return value

    def number(self, name: str) -> float:
        value = self._required(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= _LARGEST_NUMBER:
            raise ConfigError(f"{self._said(name)}; expected a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        """False where it is absent."""
        if self[name] not in (None, False, True):
            raise ConfigError(f"{self._said(name)}; expected true or false")
        return bool(self[name])

    def strings(self, name: str) -> list[str]:
        value = self._required(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{self._said(name)}; expected a list of strings")
        return value

    def _said(self, name: str) -> str:
        return f"config field {self._path}{name} is {self._json[name]!r:.80}"

    def _required(self, name: str) -> Any:
        if name not in self:
            raise ConfigError(f"the config lacks {self._path}{name}")
        return self._json[name]


def _text_part(config: Mapping[str, Any]) -> Any:
    """The text config: the whole of a text-only model's (`gemma4_text`), `text_config` of a multimodal one's."""
    model_type = config.get("model_type")
    if model_type == "gemma4":
        if not isinstance(config.get("text_config"), Mapping):
            raise ConfigError("the config lacks text_config")
        config = config["text_config"]
        model_type = config.get("model_type", "gemma4_text")
    if model_type != "gemma4_text":
        raise ConfigError(f"not a Gemma 4 config: model_type is {model_type!r}; expected 'gemma4' or 'gemma4_text'")
    return config


def _reject_quantized(config: Mapping[str, Any], text: _Fields) -> None:
    """Raise ConfigError where the config is a quantized checkpoint's."""
    for field in ("quantization_config", "quantization", "compression_config"):
        if method := config.get(field) or text[field]:
            name = method.get("quant_method", method) if isinstance(method, Mapping) else method
            raise ConfigError(f"{field} says that the weights are quantized ({name}); expected the plain checkpoint")


def _reject_unsupported(config: Mapping[str, Any], text: _Fields) -> None:
    """Raise ConfigError where the model has an unsupported feature."""
    if text.flag("enable_moe_block"):
        raise ConfigError("enable_moe_block is true: Gemma 4's mixture-of-experts models are not supported")
    if text.flag("attention_k_eq_v"):
        raise ConfigError("attention_k_eq_v is true: models whose V is their K are not supported")
    if text.flag("attention_bias"):
        raise ConfigError("attention_bias is true: expected attention without biases")
    # "vision" lets image tokens alone look ahead; among text tokens attention stays causal.
    if text["use_bidirectional_attention"] not in (None, False, "vision"):
        raise ConfigError(f"use_bidirectional_attention is {text['use_bidirectional_attention']!r}: expected causal")
    if False in (config.get("tie_word_embeddings"), text["tie_word_embeddings"]):
        raise ConfigError("tie_word_embeddings is false: expected a head tied to embed_tokens")
    if text["hidden_activation"] != "gelu_pytorch_tanh":
        raise ConfigError(f"hidden_activation is {text['hidden_activation']!r}; expected 'gelu_pytorch_tanh'")


def _layers(text: _Fields) -> tuple[LayerSpec, ...]:
    num_layers = text.integer("num_hidden_layers", most=_MOST_LAYERS)
    if "layer_types" in text:
        layer_types = text.strings("layer_types")
    else:
        layer_types = [SLIDING if (index + 1) % _DEFAULT_PATTERN else FULL for index in range(num_layers)]
        layer_types[-1] = FULL
    if len(layer_types) != num_layers:
        raise ConfigError(f"layer_types names {len(layer_types)} layers, but num_hidden_layers is {num_layers}")
    for index, layer_type in enumerate(layer_types):
        if layer_type not in (SLIDING, FULL):
            raise ConfigError(f"layer_types[{index}] is {layer_type!r}; expected {SLIDING!r} or {FULL!r}")
    if layer_types[-1] != FULL:  # `transformers` would silently make it one.
        raise ConfigError(f"the last layer is {layer_types[-1]!r}; expected {FULL!r}")

    num_kv_sources = num_layers - text.integer("num_kv_shared_layers", least=0)
    overrides = _overrides(text, layer_types)
    specs = tuple(
        _layer(text, index, layer_type, _kv_source(index, layer_types, num_kv_sources), overrides.get(index, {}))
        for index, layer_type in enumerate(layer_types)
    )
    # One set of RoPE frequencies serves all layers of a type, and so does a shared K.
    for layer_type in (SLIDING, FULL):
        shapes = {(s.attention.head_dim, s.attention.num_kv_heads) for s in specs if s.layer_type == layer_type}
        if len(shapes) > 1:
            raise ConfigError(f"{layer_type} layers differ in (head_dim, num_key_value_heads): {sorted(shapes)}")
    return specs


def _layer(text: _Fields, index: int, layer_type: str, kv_source: int, override: Mapping[str, Any]) -> LayerSpec:
    num_heads = text.integer("num_attention_heads")
    num_kv_heads = override.get("num_key_value_heads") or text.integer("num_key_value_heads")
    head_dim = override.get("head_dim") or text.integer("head_dim")
    if num_heads % num_kv_heads:
        raise ConfigError(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
    if head_dim % 2:
        raise ConfigError(f"the head_dim of layer {index} is {head_dim}; RoPE needs an even one")
    wide = text.flag("use_double_wide_mlp") and kv_source != index
    attention = GroupedQueryAttention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        sliding_window=text.integer("sliding_window") if layer_type == SLIDING else None,
        rope=_rope(_rope_parameters(text).object(layer_type), head_dim, layer_type),
    )
    mlp = DenseMLP(text.integer("intermediate_size") * (2 if wide else 1))
    return LayerSpec(index, layer_type, attention, mlp, kv_source)


def _rope_parameters(text: _Fields) -> _Fields:
    return text.object("rope_parameters") if "rope_parameters" in text else _Fields(_DEFAULT_ROPE, "rope_parameters.")


def _rope(rope: _Fields, head_dim: int, layer_type: str) -> Rope:
    """Which frequency pairs rotate, and by what: `transformers`' modeling_rope_utils."""
    theta = rope.number("rope_theta")
    if rope["rope_type"] == "default":
        return Rope(theta, head_dim // 2)
    if rope["rope_type"] != "proportional":
        raise ConfigError(f"rope_type of {layer_type} is {rope['rope_type']!r}; expected 'default' or 'proportional'")
    proportion = rope.number("partial_rotary_factor") if "partial_rotary_factor" in rope else 1.0
    if proportion > 1:
        raise ConfigError(f"partial_rotary_factor of {layer_type} is {proportion}; expected at most 1")
    return Rope(theta, int(proportion * head_dim // 2), rope.number("factor") if "factor" in rope else 1.0)


def _kv_source(index: int, layer_types: list[str], num_kv_sources: int) -> int:
    """The layer's own index where it is a KV source; for a sharing layer the last source of its type."""
    if index < num_kv_sources:
        return index
    for source in reversed(range(num_kv_sources)):
        if layer_types[source] == layer_types[index]:
            return source
    raise ConfigError(f"layer {index} shares the K and V of a {layer_types[index]} layer, but no such layer has any")


def _overrides(text: _Fields, layer_types: list[str]) -> Mapping[int, Mapping[str, int]]:
    """Overrides of the config for single layers, by layer.

    The current form writes `per_layer_config`, keyed by layer ("05" or 5), and leaves out what is not otherwise. The
    published form gives `global_head_dim` for all full layers; its `num_global_key_value_heads` takes effect only
    together with `attention_k_eq_v`, which is not supported here, so it is not read.
    """
    if "per_layer_config" not in text:
        head_dim = text.integer("global_head_dim") if "global_head_dim" in text else _DEFAULT_GLOBAL_HEAD_DIM
        return {index: {"head_dim": head_dim} for index, layer_type in enumerate(layer_types) if layer_type == FULL}
    layers = text.object("per_layer_config")
    overrides = {}
    for key in layers.names:
        if not re.fullmatch(r"[0-9]{1,9}", str(key)) or int(key) >= len(layer_types):
            raise ConfigError(
                f"per_layer_config has the key {key!r}; expected a layer from 0 to {len(layer_types) - 1}"
            )
        override = layers.object(key)
        for name in override.names:
            if name not in ("head_dim", "num_key_value_heads"):
                raise ConfigError(f"per_layer_config.{key} sets {name!r}; expected head_dim or num_key_value_heads")
        overrides[int(key)] = {name: override.integer(name) for name in override.names}
    return overrides
