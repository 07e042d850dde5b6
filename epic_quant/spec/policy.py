"""`PolicySpec`: a spec for every tensor, how K and V are stored, and how the PLE table is held."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from epic_quant.errors import SpecError, unknown
from epic_quant.spec.kv import KVSpec
from epic_quant.spec.layers import format_layers, parse_layers
from epic_quant.spec.ple import PLESpec
from epic_quant.spec.tensors import KINDS, Target, TensorClass
from epic_quant.spec.weight import BF16, WeightSpec

# The policy that everything is held against, and the same weights computed in bf16, below which a figure is noise.
REFERENCE = "bf16"
NOISE_FLOOR = "bf16-compute"
# K and V are chosen like a tensor class, and named `kv` in a policy.
KV_CACHE = "kv_cache"

_CLASSES = tuple(TensorClass)

# `[NAME=]file:PATH`, and what may follow: a comma in a path is part of it unless a key of a policy stands there.
_FILE = re.compile(
    rf"(?:(?P<name>[^=,]+)=)?file:(?P<path>.*?)(?P<rest>(?:,(?:kv|ple|{'|'.join(_CLASSES)})[.\w@+-]*=.*)?)", re.DOTALL
)


@dataclass(frozen=True)
class PolicySpec:
    """A spec for every tensor (`bf16` where none is given), a KV spec and a PLE spec.

    `weights` are the given specs by target, `kv_layers` the KV specs of layers that have one of their own. A narrower
    target overrides a wider one: a kind of tensor its class, layers all layers, and a kind the layers of its class.
    What is given but changes nothing is left out, so two policies that store the same are equal; `name` is only for
    people. With `file`, the weights are those of this published file, and the specs say what it holds once it was
    opened. Raises SpecError for an unknown target, and for a format that only such files have.
    """

    name: str = field(compare=False)
    weights: tuple[tuple[Target, WeightSpec], ...] = ()
    kv: KVSpec = field(default_factory=KVSpec)
    ple: PLESpec = field(default_factory=PLESpec)
    kv_layers: tuple[tuple[int, KVSpec], ...] = ()
    file: str | None = None

    def __post_init__(self) -> None:
        given = dict(self.weights)
        for target, spec in given.items():
            _check_target(target)
            if spec.info.is_published and self.file is None:
                raise SpecError(f"{target}={spec}: {spec.format} is only read from published files (file:PATH)")
        # From wide to narrow: a spec is kept where it differs from what would hold without it.
        kept: dict[Target, WeightSpec] = {}
        for target in sorted(given, key=_width):
            if given[target] != _resolve(kept, target) or _hides(kept, target):
                kept[target] = given[target]
        object.__setattr__(self, "weights", tuple((target, kept[target]) for target in sorted(kept, key=_order)))
        layers = {layer: kv for layer, kv in sorted(self.kv_layers) if kv != self.kv}
        object.__setattr__(self, "kv_layers", tuple(layers.items()))

    @classmethod
    def of(
        cls,
        name: str,
        weights: Mapping[Any, WeightSpec | str] | None = None,
        kv: KVSpec | str | None = None,
        ple: PLESpec | str | None = None,
    ) -> PolicySpec:
        """A policy from specs by `Target` or tensor class (or its name), as values or as texts."""
        given = {
            target if isinstance(target, Target) else Target(TensorClass(target)): _weight_spec(spec)
            for target, spec in (weights or {}).items()
        }
        return cls(
            name,
            tuple(given.items()),
            KVSpec.parse(kv) if isinstance(kv, str) else kv or KVSpec(),
            PLESpec.parse(ple) if isinstance(ple, str) else ple or PLESpec(),
        )

    @classmethod
    def parse(cls, text: str) -> PolicySpec:
        """Read a named policy, or `class=spec,…,kv=…,ple=…`; `str` is the inverse.

        `mlp.down_proj=spec` is for one kind of a class's tensors, `mlp@0-5+8=spec` and `mlp.down_proj@3=spec` for those
        layers alone, and so is `kv@3=spec`. `[NAME=]file:PATH[,kv=…][,ple=…]` are the weights of a published file,
        which is not opened here. Raises SpecError on an unknown name, class, kind or format, with the near ones, on
        what is given twice, and on layers that are no numbers.
        """
        if text in NAMED:
            return NAMED[text]
        if published := _FILE.fullmatch(text):
            if not published["path"].strip():
                raise SpecError(f"policy {text!r}: expected a path after file:")
            name, path, rest = published["name"] or _file_name(published["path"]), published["path"], published["rest"]
            parts = rest.split(",")[1:]
        elif "=" in text:
            name, path, parts = text, None, text.split(",")
        else:
            raise SpecError(unknown("policy", text, NAMED))
        weights: dict[Target, WeightSpec] = {}
        kv: dict[int | None, KVSpec] = {}
        ple: PLESpec | None = None
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals or not value:
                raise SpecError(f"policy {text!r}: {part!r} is not of the form class=spec")
            place, at, numbers = key.partition("@")
            layers: list[int | None] = [*parse_layers(numbers)] if at else [None]
            for layer in layers:
                twice = f"policy {text!r}: {place if layer is None else f'layer {layer} of {place}'} is given twice"
                if place == "ple" and layer is None:
                    if ple is not None:
                        raise SpecError(twice)
                    ple = PLESpec.parse(value)
                elif place == "kv":
                    if layer in kv:
                        raise SpecError(twice)
                    kv[layer] = KVSpec.parse(value)
                else:
                    target = _parse_target(place, layer)
                    if target in weights:
                        raise SpecError(twice)
                    weights[target] = WeightSpec.parse(value)
        whole = kv.pop(None, KVSpec())
        own = tuple((layer, spec) for layer, spec in kv.items() if layer is not None)
        return cls(name, tuple(weights.items()), whole, ple or PLESpec(), own, path)

    def __str__(self) -> str:
        file = [] if self.file is None else [f"file:{self.file}"]
        return ",".join([*file, *self._weight_parts(), *self._kv_parts(), f"ple={self.ple}"])

    def spec_of(self, target: Target) -> WeightSpec:
        """The spec of one tensor, which its class, kind and layer name (kind and layer None for a global)."""
        return _resolve(self._given, target)

    def class_spec(self, tensor_class: TensorClass) -> WeightSpec:
        """The spec of a class, which holds where no kind or layer has one of its own."""
        return self._given.get(Target(tensor_class), BF16)

    def kv_of(self, layer: int) -> KVSpec:
        """The KV spec that holds for a layer."""
        return dict(self.kv_layers).get(layer, self.kv)

    @property
    def quantized_classes(self) -> tuple[TensorClass, ...]:
        """The classes that have a spec other than bf16, for some of their tensors at least."""
        found = {target.tensor_class for target, _ in self.weights}
        return tuple(key for key in _CLASSES if key in found)

    @property
    def weight_specs(self) -> frozenset[WeightSpec]:
        """The specs of all tensors, bf16 among them where a class has none."""
        bare = {BF16 for key in _CLASSES if Target(key) not in self._given}
        return frozenset({spec for _, spec in self.weights} | bare)

    @property
    def needs_hessians(self) -> bool:
        """Whether a spec is fitted to the inputs of the layers, for which it needs their Hessians."""
        return any(spec.needs_hessian for _, spec in self.weights)

    def renamed(self, name: str) -> PolicySpec:
        """The same under another name."""
        return replace(self, name=name)

    @property
    def without_folder(self) -> PolicySpec:
        """The same with the file's name alone: what goes to other people."""
        return self if self.file is None else replace(self, file=re.split(r"[/\\]", self.file.rstrip("/\\"))[-1])

    @cached_property
    def _given(self) -> dict[Target, WeightSpec]:
        return dict(self.weights)

    def _weight_parts(self) -> Iterator[str]:
        grouped: dict[tuple[TensorClass, str | None, WeightSpec], list[int | None]] = {}
        for target, spec in self.weights:
            grouped.setdefault((target.tensor_class, target.kind, spec), []).append(target.layer)
        for (tensor_class, kind, spec), layers in grouped.items():
            place = Target(tensor_class, kind)
            numbers = [layer for layer in layers if layer is not None]
            if len(numbers) < len(layers):
                yield f"{place}={spec}"
            if numbers:
                yield f"{place}@{format_layers(numbers)}={spec}"

    def _kv_parts(self) -> Iterator[str]:
        yield f"kv={self.kv}"
        layers: dict[KVSpec, list[int]] = {}
        for layer, spec in self.kv_layers:
            layers.setdefault(spec, []).append(layer)
        for spec, numbers in layers.items():
            yield f"kv@{format_layers(numbers)}={spec}"


def _file_name(path: str) -> str:
    """What a file's policy is called by default: its name without its suffix, or its folder's."""
    name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    return re.sub(r"(-\d{5}-of-\d{5})?\.(gguf|safetensors)$", "", name)


def _resolve(given: Mapping[Target, WeightSpec], target: Target) -> WeightSpec:
    """The spec of the narrowest given target that covers this one."""
    return next((given[wider] for wider in target.covering if wider in given), BF16)


def _hides(given: Mapping[Target, WeightSpec], target: Target) -> bool:
    """Whether a kind's spec, given for all layers, overrides one that layers of its class have."""
    if target.kind is None or target.layer is not None:
        return False
    return any(other.tensor_class == target.tensor_class and other.layer is not None for other in given)


def _width(target: Target) -> int:
    """Sorts wide targets before the narrower ones that override them."""
    return 2 * (target.kind is not None) + (target.layer is not None)


def _order(target: Target) -> tuple[int, int, int]:
    """The order in a policy's text: by class; the class itself, its layers, its kinds, and their layers."""
    kinds = KINDS[target.tensor_class]
    kind = 0 if target.kind is None else 1 + kinds.index(target.kind)
    return _CLASSES.index(target.tensor_class), kind, -1 if target.layer is None else target.layer


def _check_target(target: Target) -> None:
    tensor_class, kind, layer = target
    kinds = KINDS[tensor_class]
    if kind is not None and kind not in kinds:
        if not kinds:
            raise SpecError(f"{tensor_class} is one tensor, so it has no kind {kind!r}")
        raise SpecError(unknown(f"kind of {tensor_class}", kind, kinds))
    if layer is not None and not kinds:
        raise SpecError(f"{tensor_class} is in no layer")


def _parse_target(place: str, layer: int | None) -> Target:
    name, dot, kind = place.partition(".")
    if name not in _CLASSES:
        raise SpecError(unknown("tensor class", name, [*_CLASSES, "kv", "ple"]))
    return Target(TensorClass(name), kind if dot else None, layer)


def _weight_spec(spec: WeightSpec | str) -> WeightSpec:
    return WeightSpec.parse(spec) if isinstance(spec, str) else spec


def _named(
    name: str, ple: str, attention: str, mlp: str, ple_projections: str, sliding: str | None = None
) -> PolicySpec:
    specs = {
        TensorClass.SLIDING_ATTENTION: sliding or attention,
        TensorClass.FULL_ATTENTION: attention,
        TensorClass.MLP: mlp,
        TensorClass.PLE_PROJECTIONS: ple_projections,
    }
    return PolicySpec.of(name, specs, ple=ple)


# The original's lowest 5000 ids hold the same bytes as 5000 rows of an LRU cache, so footprints compare.
NAMED: Mapping[str, PolicySpec] = {
    policy.name: policy
    for policy in (
        PolicySpec.of(REFERENCE, ple="static:5000"),
        _named("original-1.58", "static:5000", "absmax4", "absmax4", "absmax4", sliding="absmax-ternary"),
        _named("original-3", "static:5000", "absmax4", "absmax4", "absmax4", sliding="absmax3"),
        _named("original-3-packed", "static:5000", "absmax4", "absmax4", "absmax4", sliding="absmax3-packed"),
        _named("original-4", "static:5000", "absmax4", "absmax4", "absmax4"),
        _named("least-squares-1.58", "lru:5000", "int4", "int4", "int4", sliding="ternary"),
        _named("int8", "lru:5000", "int8-g128", "int8-g128", "int8-g128"),
        _named("int4-g32", "lru:5000", "int4-g32", "int4-g32", "int8-g128"),
        _named("int4-g128", "lru:5000", "int4-g128", "int4-g128", "int8-g128"),
        _named("int3-g128", "lru:5000", "int3-g128", "int3-g128", "int8-g128"),
        _named("int2-g128", "lru:5000", "int2-g128", "int2-g128", "int8-g128"),
        *(
            _named(f"trellis{bits}", "lru:5000", f"trellis{bits}+had256", f"trellis{bits}+had256", "int8-g128")
            for bits in (4, 3, 2)
        ),
        _named("ternary-g128", "lru:5000", "ternary-g128", "ternary-g128", "int8-g128"),
    )
}


def recipe_name(resident_nbytes: float | None, decimals: int = 1, kv: str = "") -> str:
    """What a recipe goes by, such as `recipe, 25.4 MB`, for a policy string is too long; `kv` stands after `recipe`."""
    size = "" if resident_nbytes is None else f", {resident_nbytes / 1e6:,.{decimals}f} MB"
    return f"recipe{kv}{size}"
