"""The variants evaluated together, and the layers up to which two of them agree."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, TypeVar

import torch

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import SpecError
from epic_quant.gemma4.config import LayerSpec, TextConfig
from epic_quant.gemma4.tensors import TextTensor, expected_tensors
from epic_quant.gemma4.weights import Weights
from epic_quant.policy import check, opened, spec_of, weights_of
from epic_quant.published import open_published
from epic_quant.quant import Hessian
from epic_quant.spec import BF16, NAMED, NOISE_FLOOR, REFERENCE, LayerKVSpec, PolicySpec, TensorClass, WeightSpec

# Equal for two variants that store a tensor alike: a published file's path, or a spec; None where it is as the
# checkpoint has it.
TensorKey = WeightSpec | str | None


@dataclass(frozen=True)
class Variant:
    """A policy and the dtype computed in. PLE policies change no result, so two that differ in them alone agree."""

    policy: PolicySpec
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        file = "" if self.policy.file is None else f"; {open_published(self.policy.file).fingerprint}"
        return f"{self.policy}; {str(self.dtype).removeprefix('torch.')}{file}"

    def weights(self, checkpoint: Checkpoint, hessians: Mapping[str, Hessian]) -> Weights:
        """The weights that it computes with."""
        return weights_of(checkpoint, self.policy, hessians)

    def key(self, tensor: TextTensor) -> TensorKey:
        """How it stores a tensor: variants with equal keys hold the same."""
        if self.policy.file is not None:
            return self.policy.file
        spec = spec_of(self.policy, tensor)
        return None if spec == BF16 else spec

    def kv(self, layer: LayerSpec) -> LayerKVSpec | None:
        """How it stores a layer's K and V; None where it has none of its own, or keeps them in the dtype computed in.

        What `bf16` rounds is part of the noise floor instead.
        """
        spec = self.policy.kv_of(layer.index).of(layer.layer_type)
        return None if spec.is_plain or not layer.is_kv_source else spec


def noise_floor() -> Variant:
    """The checkpoint's own weights, computed in bf16."""
    return Variant(PolicySpec(NOISE_FLOOR), dtype=torch.bfloat16)


def with_reference(policies: Mapping[str, PolicySpec | Variant], config: TextConfig) -> dict[str, Variant]:
    """The policies as variants, after the reference: the checkpoint's own weights in fp32.

    Raises SpecError where the reference's name stands for another policy, and for a policy that does not fit the model.
    """
    variants = {REFERENCE: Variant(NAMED[REFERENCE])}
    for name, policy in policies.items():
        variant = policy if isinstance(policy, Variant) else Variant(policy)
        try:
            check(variant.policy, config)
            variant = replace(variant, policy=opened(variant.policy, config))
        except SpecError as error:
            raise SpecError(f"{name}: {error}") from error
        if name == REFERENCE and signature(variant, config) != signature(variants[REFERENCE], config):
            raise SpecError(f"{REFERENCE!r} is the reference, the checkpoint's own weights; give {policy} another name")
        variants[name] = variant
    return variants


class StartKey(NamedTuple):
    """What decides a variant's hidden state before the first layer, and its PLE inputs."""

    dtype: torch.dtype
    tables: tuple[TensorKey, ...]  # the embedding, the PLE table and the PLE model projection


class LayerKey(NamedTuple):
    """What decides what a layer does."""

    weights: tuple[TensorKey, ...]
    kv: LayerKVSpec | None


def start_key(variant: Variant, config: TextConfig) -> StartKey:
    """Variants that agree in it begin alike."""
    return StartKey(variant.dtype, tuple(variant.key(tensor) for tensor in matrices(config)[None]))


def layer_key(variant: Variant, layer: LayerSpec, config: TextConfig) -> LayerKey:
    """Variants that agree in it, and were the same before this layer, are the same after it."""
    return LayerKey(tuple(variant.key(tensor) for tensor in matrices(config)[layer.index]), variant.kv(layer))


def head_key(variant: Variant, config: TextConfig) -> tuple[torch.dtype, TensorKey]:
    """Variants that agree in it have the same head: the embedding, to which it is tied."""
    return variant.dtype, variant.key(embedding(config))


def signature(variant: Variant, config: TextConfig) -> tuple[StartKey | LayerKey, ...]:
    """All of its keys, in order: two variants share their states as long as these are the same."""
    return (start_key(variant, config), *(layer_key(variant, layer, config) for layer in config.layers))


@cache
def matrices(config: TextConfig) -> Mapping[int | None, tuple[TextTensor, ...]]:
    """The matrices that are used, by layer; None has those of no layer."""
    used = [tensor for tensor in expected_tensors(config) if tensor.tensor_class is not None and not tensor.unused]
    return {key: tuple(tensors) for key, tensors in grouped(used, lambda tensor: tensor.layer).items()}


def embedding(config: TextConfig) -> TextTensor:
    """The embedding, which is the head as well."""
    return next(tensor for tensor in matrices(config)[None] if tensor.tensor_class is TensorClass.EMBEDDING)


_Item = TypeVar("_Item")
_Key = TypeVar("_Key", bound=Hashable)


def grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """The items by their key, both in order of appearance."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
