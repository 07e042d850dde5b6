"""What is evaluated side by side, and up to where two of them are the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

from epic_quant.errors import SpecError
from epic_quant.gemma4.config import LayerSpec, TextConfig
from epic_quant.gemma4.tensors import TensorClass
from epic_quant.kv import KVPolicy, LayerPolicy
from epic_quant.policy import NAMED, Policy

REFERENCE = "bf16"
NOISE_FLOOR = "bf16-compute"

_BF16 = NAMED["bf16"]


@dataclass(frozen=True)
class Variant:
    """A policy for the tables and for every layer that `by_layer` gives no other one; and the dtype computed in.

    So a single class of a single layer is quantized by `Variant(NAMED["bf16"], {3: Policy("", {MLP: "int4"})})`.
    Of a layer's policy only its own classes and KV policy count, of the tables' only theirs; PLE policies change no
    result and never count.
    """

    policy: Policy
    by_layer: Mapping[int, Policy] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        layers = [f"layer {layer}: {policy}" for layer, policy in sorted(self.by_layer.items())]
        return "; ".join([str(self.policy), *layers, str(self.dtype).removeprefix("torch.")])

    def at(self, layer: int) -> Policy:
        """The policy that holds for a layer."""
        return self.by_layer.get(layer, self.policy).at(layer)

    @property
    def specs(self) -> set[str]:
        """The specs of all classes, in any layer."""
        return {spec for policy in (self.policy, *self.by_layer.values()) for spec in policy.all_specs}


def with_reference(policies: Mapping[str, Policy | Variant], config: TextConfig) -> dict[str, Variant]:
    """The policies as variants, after the reference: the checkpoint's own weights in fp32.

    Raises SpecError where the reference's name stands for another policy, and for a layer that is not there.
    """
    variants = {REFERENCE: Variant(_BF16)}
    for name, policy in policies.items():
        variant = policy if isinstance(policy, Variant) else Variant(policy)
        for policy_of in (variant.policy, *variant.by_layer.values()):
            policy_of.check(config)
        for layer in variant.by_layer:
            if not 0 <= layer < config.num_layers:
                raise SpecError(f"{name}: there is no layer {layer}; expected 0 to {config.num_layers - 1}")
        if name == REFERENCE and signature(variant, config) != signature(variants[REFERENCE], config):
            raise SpecError(f"{REFERENCE!r} is the reference, the checkpoint's own weights; give {policy} another name")
        variants[name] = variant
    return variants


class StartKey(NamedTuple):
    """What decides a variant's hidden state before the first layer, and its PLE inputs."""

    dtype: torch.dtype
    specs: tuple[str, ...]  # of the embedding, the PLE table and the PLE model projection


class LayerKey(NamedTuple):
    """What decides what a layer does."""

    specs: tuple[tuple[TensorClass, str], ...]  # of the classes that the layer has
    kv: LayerPolicy | None  # None where it owns no K and V, or keeps them in the dtype computed in


def start_key(variant: Variant, config: TextConfig) -> StartKey:
    """Variants that agree in it begin alike."""
    parts = [TensorClass.EMBEDDING]
    if config.ple_dim:
        parts += [TensorClass.PLE_TABLE, TensorClass.PLE_MODEL_PROJECTION]
    return StartKey(variant.dtype, tuple(variant.policy.specs[part] for part in parts))


def layer_key(variant: Variant, spec: LayerSpec, config: TextConfig) -> LayerKey:
    """Variants that agree in it, and were the same before this layer, are the same after it."""
    policy = variant.at(spec.index)
    parts = [TensorClass(spec.layer_type), TensorClass.MLP]
    if config.ple_dim:
        parts.append(TensorClass.PLE_PROJECTIONS)
    return LayerKey(tuple((part, policy.specs[part]) for part in parts), _quantized_kv(policy.kv, spec))


def signature(variant: Variant, config: TextConfig) -> tuple[StartKey | LayerKey, ...]:
    """All of its keys, in order: two variants share their states as long as these are the same."""
    return (start_key(variant, config), *(layer_key(variant, spec, config) for spec in config.layers))


def _quantized_kv(kv: KVPolicy, spec: LayerSpec) -> LayerPolicy | None:
    """The layer's KV policy where it quantizes anything. What `bf16` rounds is part of the noise floor instead."""
    layer = kv.layer(spec)
    plain = all(isinstance(storage.how, torch.dtype) for storage in (*layer.k, *layer.v))
    return None if plain or not spec.is_kv_source else layer


_Item = TypeVar("_Item")
_Key = TypeVar("_Key", bound=Hashable)


def grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """The items by their key, both in order of appearance."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
