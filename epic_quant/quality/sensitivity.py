"""One change at a time: a tensor class, or the KV cache, in a scheme of its own, and everything else in bf16."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TensorClass, TextTensor, expected_tensors
from epic_quant.kv import KVPolicy
from epic_quant.policy import UNQUANTIZED, Policy
from epic_quant.quality.variants import Variant
from epic_quant.quant import quantizer

# Eight bits down to ternary, with the same group.
SCHEMES = ("int8", "int6", "int5", "int4", "int3", "ternary")
GROUP = 128

KV_CACHE = "kv_cache"


@dataclass(frozen=True)
class Ablation:
    """A tensor class under a spec, or `kv_cache` under a KV policy; in one layer alone where `layer` says so."""

    tensor_class: str
    spec: str
    layer: int | None = None

    def __str__(self) -> str:
        return f"{self.tensor_class} {self.spec}" + ("" if self.layer is None else f" layer {self.layer}")

    def policy(self) -> Policy:
        """What is changed, and bf16 else."""
        if self.tensor_class == KV_CACHE:
            return Policy(str(self), {}, KVPolicy.parse(self.spec))
        return Policy(str(self), {TensorClass(self.tensor_class): self.spec})

    def variant(self) -> Variant:
        """What `evaluate` takes."""
        if self.layer is None:
            return Variant(self.policy())
        return Variant(Policy(UNQUANTIZED, {}), {self.layer: self.policy()})

    def tensors(self, config: TextConfig) -> list[TextTensor]:
        """The live tensors whose weights are changed."""
        return [
            tensor
            for tensor in expected_tensors(config)
            if tensor.tensor_class == self.tensor_class
            and not tensor.unused
            and (self.layer is None or tensor.layer == self.layer)
        ]


def changes(config: TextConfig, kv_policies: Iterable[str] = (), *, by_layer: bool = False) -> list[Ablation]:
    """Every class that the model has at 8, 6, 5, 4, 3 bits and ternary, and the KV policies, in all layers together.

    With `by_layer` also in each layer alone that has tensors of the class, or owns K and V. Groups are of 128 weights,
    or of the largest smaller power of two that divides every row of the class.
    """
    whole: list[Ablation] = []
    layers: dict[str, list[int]] = {KV_CACHE: [layer.index for layer in config.layers if layer.is_kv_source]}
    for part in TensorClass:
        if tensors := Ablation(part, UNQUANTIZED).tensors(config):
            whole += [Ablation(part.value, f"{scheme}-g{_group(tensors)}") for scheme in SCHEMES]
            layers[part] = sorted({tensor.layer for tensor in tensors if tensor.layer is not None})
    whole += [Ablation(KV_CACHE, policy) for policy in kv_policies]
    if not by_layer:
        return whole
    return whole + [replace(change, layer=layer) for change in whole for layer in layers[change.tensor_class]]


def _group(tensors: Iterable[TextTensor]) -> int:
    group = GROUP
    while not all(quantizer(f"int8-g{group}").fits(tensor.shape[1]) for tensor in tensors):
        group //= 2
    return group
