"""`KVPolicy`: how keys and values are stored, as a policy string names it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from epic_quant.errors import SpecError, unknown
from epic_quant.gemma4.config import FULL, LayerSpec, TextConfig
from epic_quant.kv.layer import LayerStore
from epic_quant.kv.storage import Head, LayerPolicy, Storage, begins_with_a_scheme

_WHERE = re.compile(r"(?:(full|sliding)\.)?([kv])(?:\.(rotated|unrotated))?")
_COUNT = re.compile(r"(?:(full|sliding)\.)?(recent|first)")
_PLACES = [*(f"{layers}{side}" for layers in ("", "full.", "sliding.") for side in "kv"), "full.k.unrotated", "recent"]


@dataclass(frozen=True)
class KVPolicy:
    """How full and sliding layers store K and V; `KVPolicy()` is bf16.

    `name` is only for people: two policies that store the same are equal.
    """

    full: LayerPolicy = field(default_factory=LayerPolicy)
    sliding: LayerPolicy = field(default_factory=LayerPolicy)
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.sliding.first:
            raise SpecError("a sliding layer loses its first tokens, so `first` is for full layers alone")
        object.__setattr__(self, "name", self.name or str(self))

    @classmethod
    def parse(cls, text: str) -> KVPolicy:
        """Read a named policy, or a spec: parts joined by `/`, of which a later one overrides what it covers.

        A part is `WHERE=STORAGE`, or a bare STORAGE for all of K and V, or as the first part a named policy. WHERE is
        `k` or `v`, with `full.` or `sliding.` before it for layers of that type alone, and `.rotated` or `.unrotated`
        after it for the dims of a head that RoPE turns or for the others. `[full.|sliding.]recent=N` and
        `[full.]first=N` leave the newest and the first N tokens unquantized. STORAGE is as `Storage` says.
        `str(policy)` is the inverse. Raises SpecError on any other text, with the near names.
        """
        return NAMED[text] if text in NAMED else _read(text, NAMED)

    def __str__(self) -> str:
        full, sliding = self.full, self.sliding
        if full.k == full.v == sliding.k == sliding.v and len(full.k) == 1:
            said = [str(full.k[0])]
        else:
            said = _by_type(_head_parts("k", full.k), _head_parts("k", sliding.k))
            said += _by_type(_head_parts("v", full.v), _head_parts("v", sliding.v))
        said += _by_type([f"recent={full.recent}"], [f"recent={sliding.recent}"])
        said += [f"first={full.first}"]
        return "/".join(part for part in said if not part.endswith("=0"))

    def layer(self, spec: LayerSpec) -> LayerPolicy:
        """What holds for that layer."""
        return self.full if spec.layer_type == FULL else self.sliding

    def nbytes(self, config: TextConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that a `KVCache` stores of `tokens` tokens: the layers that own K and V alone.

        Counted are a token and a block that are really quantized, times how many of each the cache holds by then.
        What is not quantized is held in `dtype`. Raises SpecError where the policy does not fit the heads.
        """
        return sum(self.layer_nbytes(spec, tokens, dtype) for spec in config.layers if spec.is_kv_source)

    def layer_nbytes(self, spec: LayerSpec, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """The same of one layer, as if it owned K and V where it does not."""
        return LayerStore(spec, self.layer(spec), dtype).nbytes_after(tokens)


def _read(text: str, named: Mapping[str, KVPolicy]) -> KVPolicy:
    policy = KVPolicy()
    for index, part in enumerate(text.split("/")):
        place, equals, value = part.partition("=")
        if equals:
            policy = _changed(policy, place, value)
        elif index == 0 and part in named:
            policy = named[part]
        elif begins_with_a_scheme(part):
            policy = _on_layers(policy, None, k=(Storage.parse(part),), v=(Storage.parse(part),))
        elif part in named:
            raise SpecError(f"kv={text}: the named policy {part} must come first")
        else:
            raise SpecError(unknown("KV policy", part, named))
    return replace(policy, name=text)


def _changed(policy: KVPolicy, place: str, value: str) -> KVPolicy:
    """The policy after the part `place=value`."""
    if count := _COUNT.fullmatch(place):
        layer_type, which = count[1], count[2]
        if not re.fullmatch("[0-9]{1,9}", value):
            raise SpecError(f"{place}={value}: {value!r} is not a number of tokens")
        if which == "first" and layer_type is None:
            layer_type = "full"
        return _on_layers(policy, layer_type, **{which: int(value)})
    if not (where := _WHERE.fullmatch(place)):
        raise SpecError(unknown("place of K or V", place, _PLACES))
    layer_type, side, dims = where[1], where[2], where[3]
    storage = Storage.parse(value)
    for one in ("full", "sliding") if layer_type is None else (layer_type,):
        head = getattr(getattr(policy, one), side)
        policy = _on_layers(policy, one, **{side: _head_with(head, dims, storage)})
    return policy


def _head_with(head: Head, dims: str | None, storage: Storage) -> Head:
    if dims is None:
        return (storage,)
    rotated, unrotated = head[0], head[-1]
    return (storage, unrotated) if dims == "rotated" else (rotated, storage)


def _on_layers(policy: KVPolicy, layer_type: str | None, **changes: Head | int) -> KVPolicy:
    for one in ("full", "sliding") if layer_type is None else (layer_type,):
        changed: LayerPolicy = replace(getattr(policy, one), **changes)
        policy = replace(policy, **{one: changed}, name="")
    return policy


def _head_parts(side: str, head: Head) -> list[str]:
    if len(head) == 1:
        return [f"{side}={head[0]}"]
    return [f"{side}.rotated={head[0]}", f"{side}.unrotated={head[1]}"]


def _by_type(full: list[str], sliding: list[str]) -> list[str]:
    """Parts said once where both layer types have the same."""
    if full == sliding:
        return full
    return [*(f"full.{part}" for part in full), *(f"sliding.{part}" for part in sliding)]


# Specs that KVPolicy.parse reads, by name. The original's schemes take their scale from the largest value alone.
_SPECS = {
    "bf16": "bf16",
    "fp32": "fp32",
    "int8": "int8",
    "int4": "int4",
    "int4+had": "int4+had512",
    "per-channel-k": "k=int4@64/v=int4",
    "original": "absmax4/full.k.unrotated=absmax2/full.v.unrotated=absmax2",
    "original+ls": "int4/full.k.unrotated=int2/full.v.unrotated=int2",
    # V has no dims that turn: its split only brings the total to that of the original.
    "original-inverted": "int4/full.k.rotated=int2/full.k.unrotated=int3/full.v.rotated=int3/full.v.unrotated=int2",
    # Found with benchmarks/search_kv.py on the small model's calibration text.
    "p-rope": "full.k.rotated=codebook4@64/full.k.unrotated=codebook2+had512+center128+pca8-int5+unbiased"
    "/full.v=codebook2+center128+pca12-codebook4@128/full.first=1/sliding.k=codebook4+had512/sliding.v=codebook4+had512",
    "p-rope-4": "full.k.rotated=affine5@128/full.k.unrotated=codebook3+had512+center128+pca12-int6+unbiased"
    "/full.v=affine4+had512@128/full.first=2/sliding.k=codebook4+had512/sliding.v=codebook4+had512",
}

NAMED: Mapping[str, KVPolicy] = MappingProxyType(
    {name: replace(_read(spec, {}), name=name) for name, spec in _SPECS.items()}
)
