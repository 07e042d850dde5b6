"""Ablations: one tensor class, or the KV cache, in a spec of its own, and everything else in bf16."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TextTensor, expected_tensors
from epic_quant.spec import KV_CACHE, KVSpec, PolicySpec, Target, TensorClass, WeightSpec

# Eight bits down to ternary, with the same group.
FORMATS = ("int8", "int6", "int5", "int4", "int3", "ternary")
GROUP_SIZE = 128


@dataclass(frozen=True)
class Ablation:
    """A tensor class under a weight spec, or K and V under a KV spec; in one layer alone where `layer` names it."""

    spec: WeightSpec | KVSpec
    tensor_class: TensorClass | None = None  # None for K and V
    layer: int | None = None

    def __str__(self) -> str:
        return f"{self.what} {self.spec_name}" + ("" if self.layer is None else f" layer {self.layer}")

    @property
    def what(self) -> str:
        """The tensor class, or `kv_cache`."""
        return KV_CACHE if self.tensor_class is None else self.tensor_class.value

    @property
    def spec_name(self) -> str:
        """The spec's text, or the name that a KV spec goes by."""
        return self.spec.name if isinstance(self.spec, KVSpec) else str(self.spec)

    @property
    def policy(self) -> PolicySpec:
        """The spec, and bf16 for everything else."""
        if isinstance(self.spec, KVSpec):
            if self.layer is None:
                return PolicySpec(str(self), kv=self.spec)
            return PolicySpec(str(self), kv_layers=((self.layer, self.spec),))
        assert self.tensor_class is not None
        return PolicySpec(str(self), ((Target(self.tensor_class, None, self.layer), self.spec),))

    def tensors(self, config: TextConfig) -> list[TextTensor]:
        """The tensors in use whose weights are quantized."""
        return [
            tensor
            for tensor in expected_tensors(config)
            if tensor.tensor_class is not None
            and tensor.tensor_class == self.tensor_class
            and not tensor.unused
            and (self.layer is None or tensor.layer == self.layer)
        ]


def ablations(config: TextConfig, kv_specs: Iterable[KVSpec] = (), *, by_layer: bool = False) -> list[Ablation]:
    """Every class that the model has at 8, 6, 5, 4, 3 bits and ternary, and the KV specs, in all layers together.

    With `by_layer` also in each layer alone that has tensors of the class, or K and V of its own. Groups are of 128
    weights, or of the largest smaller power of two that divides every row of the class.
    """
    whole: list[Ablation] = []
    layers: dict[TensorClass | None, list[int]] = {None: [layer.index for layer in config.layers if layer.is_kv_source]}
    for part in TensorClass:
        if tensors := Ablation(WeightSpec("int8"), part).tensors(config):
            cols = {tensor.shape[1] for tensor in tensors}
            fitting = (WeightSpec(name, GROUP_SIZE).with_dividing_group(cols) for name in FORMATS)
            whole += [Ablation(spec, part) for spec in fitting if spec is not None]
            layers[part] = sorted({tensor.layer for tensor in tensors if tensor.layer is not None})
    whole += [Ablation(spec) for spec in kv_specs]
    if not by_layer:
        return whole
    return whole + [replace(one, layer=layer) for one in whole for layer in layers[one.tensor_class]]
