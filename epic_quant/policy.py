"""Policies: a quantizer for each tensor class, how the PLE table is held, how K and V are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import QuantizationError, SpecError, unknown
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TensorClass, TextTensor, expected_tensors
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.kv import KVPolicy
from epic_quant.ple import PLEPolicy
from epic_quant.quant import Weight, quantizer
from epic_quant.spec.layers import format_layers, parse_layers

UNQUANTIZED = "bf16"

_OF_LAYERS = (
    TensorClass.SLIDING_ATTENTION,
    TensorClass.FULL_ATTENTION,
    TensorClass.MLP,
    TensorClass.PLE_PROJECTIONS,
)


@dataclass(frozen=True)
class Policy:
    """A spec for every tensor class (`bf16` where none is said), a KV policy and a PLE policy.

    `by_layer` has the layers whose tensors of a class have another spec than the class. `name` is only for people: two
    policies that store the same are equal. Raises SpecError on a layer of a class that is in no layer.
    """

    name: str = field(compare=False)
    specs: Mapping[TensorClass, str]
    kv: KVPolicy = field(default_factory=KVPolicy)
    ple: PLEPolicy = field(default_factory=PLEPolicy)
    by_layer: Mapping[tuple[TensorClass, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        said = {TensorClass(key): quantizer(spec).spec for key, spec in self.specs.items()}
        whole = {tensor_class: said.get(tensor_class, UNQUANTIZED) for tensor_class in TensorClass}
        object.__setattr__(self, "specs", MappingProxyType(whole))
        if globals_ := [key for key, _ in self.by_layer if key not in _OF_LAYERS]:
            raise SpecError(f"{globals_[0]} is in no layer")
        others = {
            (TensorClass(key), layer): quantizer(spec).spec for (key, layer), spec in sorted(self.by_layer.items())
        }
        others = {(key, layer): spec for (key, layer), spec in others.items() if spec != whole[key]}
        object.__setattr__(self, "by_layer", MappingProxyType(others))

    def __hash__(self) -> int:
        return hash(str(self))

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read a named policy, or `class=spec,…,kv=…,ple=…`; `str(policy)` is the inverse.

        `class@0-5+8=spec` is for those layers alone. Raises SpecError on an unknown name, class or scheme, with the
        near ones, on a class or layer said twice, and on layers that are no numbers.
        """
        if text in NAMED:
            return NAMED[text]
        if "=" not in text:
            raise SpecError(unknown("policy", text, NAMED))
        said: dict[str, str] = {}
        by_layer: dict[tuple[TensorClass, int], str] = {}
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if not equals or not value:
                raise SpecError(f"policy {text!r}: {part!r} is not of the form class=spec")
            if key in said:
                raise SpecError(f"policy {text!r}: {key} is said twice")
            tensor_class, at, layers = key.partition("@")
            if tensor_class not in (*TensorClass, *(() if at else ("kv", "ple"))):
                raise SpecError(unknown("tensor class", tensor_class, [*TensorClass, "kv", "ple"]))
            if not at:
                said[key] = value
                continue
            for layer in parse_layers(layers):
                if (TensorClass(tensor_class), layer) in by_layer:
                    raise SpecError(f"policy {text!r}: layer {layer} of {tensor_class} is said twice")
                by_layer[TensorClass(tensor_class), layer] = value
        kv, ple = KVPolicy.parse(said.pop("kv", "bf16")), PLEPolicy.parse(said.pop("ple", "all"))
        return cls(text, {TensorClass(key): spec for key, spec in said.items()}, kv, ple, by_layer)

    def __str__(self) -> str:
        parts = []
        for key in self.quantized_classes:
            if self.specs[key] != UNQUANTIZED:
                parts.append(f"{key}={self.specs[key]}")
            others: dict[str, list[int]] = {}
            for (tensor_class, layer), spec in self.by_layer.items():
                if tensor_class is key:
                    others.setdefault(spec, []).append(layer)
            parts += [f"{key}@{format_layers(layers)}={spec}" for spec, layers in others.items()]
        return ",".join([*parts, f"kv={self.kv}", f"ple={self.ple}"])

    @property
    def quantized_classes(self) -> tuple[TensorClass, ...]:
        """The classes that are not kept in bf16, or not in every layer."""
        layered = {tensor_class for tensor_class, _ in self.by_layer}
        return tuple(key for key, spec in self.specs.items() if spec != UNQUANTIZED or key in layered)

    @property
    def all_specs(self) -> set[str]:
        """The specs of all classes, in any layer."""
        return {*self.specs.values(), *self.by_layer.values()}

    def spec_of(self, tensor: TextTensor) -> str:
        """The spec that a tensor is stored in; `bf16` where it is in no class."""
        if tensor.tensor_class is None:
            return UNQUANTIZED
        whole = self.specs[tensor.tensor_class]
        return whole if tensor.layer is None else self.by_layer.get((tensor.tensor_class, tensor.layer), whole)

    def at(self, layer: int) -> Policy:
        """What holds for that layer, said for all."""
        if not self.by_layer:
            return self
        here = {key: spec for (key, number), spec in self.by_layer.items() if number == layer}
        return replace(self, specs={**self.specs, **here}, by_layer={})

    def check(self, config: TextConfig) -> None:
        """Raise SpecError where it names a layer that the model, or that class of it, does not have."""
        there = {(tensor.tensor_class, tensor.layer) for tensor in expected_tensors(config)}
        for tensor_class, layer in self.by_layer:
            if (tensor_class, layer) not in there:
                raise SpecError(f"{tensor_class}@{layer}: of {config.num_layers} layers there is none such")

    def weights(self, checkpoint: Checkpoint, hessians: Mapping[str, Tensor] | None = None) -> PolicyWeights:
        """The checkpoint's weights under this policy; `hessians` by canonical tensor name, for specs with `+gptq`."""
        return PolicyWeights(self, checkpoint, hessians)


class PolicyWeights:
    """A checkpoint's weights with every matrix quantized as its class says: a `gemma4.weights.Weights`.

    Nothing is held: a layer is read and quantized when it is asked for, rows of a table alike.
    """

    def __init__(self, policy: Policy, checkpoint: Checkpoint, hessians: Mapping[str, Tensor] | None = None) -> None:
        self._plain = CheckpointWeights(checkpoint)
        policy.check(self._plain.config)
        self._policy = policy
        self._hessians = hessians or {}

    @property
    def config(self) -> TextConfig:
        """The checkpoint's text config."""
        return self._plain.config

    def layer(self, index: int) -> Mapping[str, Weight]:
        """Layer `index`'s live weights by their name inside the layer."""
        prefix = f"layers.{index}."
        return {
            name: self._quantized(self._plain.tensors[prefix + name], weight)
            for name, weight in self._plain.layer(index).items()
        }

    def get(self, name: str) -> Weight:
        """A global weight by its canonical name."""
        return self._quantized(self._plain.tensors[name], self._plain.get(name))

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows [n, cols] of a table, decoded. Every scheme keeps rows apart, so only these are quantized."""
        weight = self._quantized(self._plain.tensors[name], self._plain.rows(name, ids))
        return weight if isinstance(weight, Tensor) else weight.dequantize()

    def _quantized(self, tensor: TextTensor, weight: Weight) -> Weight:
        spec = self._policy.spec_of(tensor)
        if spec == UNQUANTIZED or not isinstance(weight, Tensor):
            return weight
        try:
            return quantizer(spec).quantize(weight, self._hessians.get(tensor.name))
        except QuantizationError as error:
            raise QuantizationError(f"{tensor.name}: {error}") from error


def _named(name: str, ple: str, **specs: str) -> Policy:
    return Policy(name, {TensorClass(key): spec for key, spec in specs.items()}, ple=PLEPolicy.parse(ple))


def _linear(attention: str, mlp: str, ple_projections: str) -> dict[str, str]:
    return {
        "sliding_attention": attention,
        "full_attention": attention,
        "mlp": mlp,
        "ple_projections": ple_projections,
    }


def _original(sliding: str) -> dict[str, str]:
    return _linear("absmax4", "absmax4", "absmax4") | {"sliding_attention": sliding}


# The original's lowest 5000 ids hold the same bytes as 5000 rows of an LRU cache, so footprints compare.
NAMED: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        _named("bf16", "static:5000"),
        _named("original-1.58", "static:5000", **_original("absmax-ternary")),
        _named("original-3", "static:5000", **_original("absmax3")),
        _named("original-3-packed", "static:5000", **_original("absmax3-packed")),
        _named("original-4", "static:5000", **_original("absmax4")),
        _named("least-squares-1.58", "lru:5000", **_linear("int4", "int4", "int4") | {"sliding_attention": "ternary"}),
        _named("int8", "lru:5000", **_linear("int8-g128", "int8-g128", "int8-g128")),
        _named("int4-g32", "lru:5000", **_linear("int4-g32", "int4-g32", "int8-g128")),
        _named("int4-g128", "lru:5000", **_linear("int4-g128", "int4-g128", "int8-g128")),
        _named("int3-g128", "lru:5000", **_linear("int3-g128", "int3-g128", "int8-g128")),
        _named("int2-g128", "lru:5000", **_linear("int2-g128", "int2-g128", "int8-g128")),
        _named("ternary-g128", "lru:5000", **_linear("ternary-g128", "ternary-g128", "int8-g128")),
    )
}
