"""`KVSpec`: how keys and values are stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

from epic_quant.errors import SpecError, unknown
from epic_quant.spec.formats import FORMATS
from epic_quant.spec.weight import WeightSpec, refuse_rest, split_format, take

# Dtypes in which K and V are stored as they are.
PLAIN = ("bf16", "fp32")

_FORMATS = sorted({*FORMATS, *PLAIN})
_COUNT = "[1-9][0-9]{0,8}"
_STAGES = ["hadBLOCK", "centerTOKENS", "pcaDIRECTIONS-FORMAT", "clipPERCENT", "unbiased"]
_WHERE = re.compile(r"(?:(full|sliding)\.)?([kv])(?:\.(rotated|unrotated))?")
_TOKENS = re.compile(r"(?:(full|sliding)\.)?(residual|sinks)")
_PLACES = [*(f"{layers}{side}" for layers in ("", "full.", "sliding.") for side in "kv"), "full.k.unrotated"]

LayerType = Literal["full", "sliding"]
_LAYER_TYPES: tuple[LayerType, ...] = ("full", "sliding")


class PCASpec(NamedTuple):
    """Directions of largest variance, and the format of the coordinates along them."""

    directions: int
    format: str


@dataclass(frozen=True)
class KVStorageSpec:
    """How some dims of a head are stored: a dtype, or a format and the chain of transforms before it.

    `FORMAT[-gGROUP|-bTOKENS][+hadBLOCK][+centerTOKENS][+pcaDIRECTIONS-FORMAT][+clipPERCENT][+unbiased]`. Without
    `-b` every token and head has its own scales, one for every group of dims; with it every channel has one scale for
    a block of so many tokens. The Hadamard transform is over the dims in either case.

    - `center` subtracts a fixed offset from every head and channel: the mean of so many tokens, rounded up to whole
      blocks, the first that are quantized, which wait until all of them are there.
    - `pca` rotates heads so that the first coordinates lie along the directions in which the tokens of the center vary
      most (principal component analysis), and stores those coordinates in a format of their own.
    - `clip` moves what is in the outer so many percent of the range, at either end, to where they begin.
    - `unbiased`: a least-squares scale shortens what it stores; this lengthens it again, so that products with queries
      are right on average, as RaBitQ does (Gao and Long, 2024).

    Raises SpecError for settings that contradict each other.
    """

    format: str
    group_size: int | None = None
    block_tokens: int | None = None
    hadamard_block: int = 0
    center_tokens: int | None = None
    pca: PCASpec | None = None
    clip_percent: int | None = None
    unbiased: bool = False

    def __post_init__(self) -> None:
        if self.is_plain:
            if any(vars(self)[option] for option in vars(self) if option != "format"):
                raise SpecError(f"{self}: {self.format} stores values as they are, without options")
            return
        info = self.quantizer.info  # Raises where the format, group or Hadamard block is wrong.
        if not info.has_groups:
            raise SpecError(f"{self}: blocks of {info.block_size} weights are not for K and V")
        if info.state_bits:
            raise SpecError(f"{self}: a trellis, whose codes overlap, is not for K and V")
        if self.block_tokens is not None and self.group_size is not None:
            raise SpecError(f"{self}: scales are either for groups of dims or for blocks of tokens, not for both")
        # Eight codes of any width are whole bytes.
        if self.block_tokens is not None and (self.block_tokens < 1 or self.block_tokens % 8):
            raise SpecError(f"{self}: a block of tokens must be a multiple of 8")
        if self.center_tokens is not None and self.center_tokens < 1:
            raise SpecError(f"{self}: a center is the mean of 1 token or more")
        infos = [info]
        if self.pca is not None:
            if self.pca.format not in FORMATS:
                raise SpecError(f"{unknown('format', self.pca.format, FORMATS)} (in {str(self)!r})")
            infos.append(FORMATS[self.pca.format])
            if self.pca.directions < 1 or not infos[-1].has_groups or infos[-1].state_bits:
                raise SpecError(f"{self}: +pca is 1 direction or more, stored in a format with scales")
            if self.center_tokens is None:
                raise SpecError(f"{self}: +pca finds its directions in the tokens of a center")
        if self.clip_percent is not None and not 1 <= self.clip_percent < 50:
            raise SpecError(f"{self}: what is clipped at either end must be 1 to 49 percent")
        if (self.pca or self.clip_percent or self.unbiased) and self.group_size is not None:
            raise SpecError(f"{self}: +pca, +clip and +unbiased are for a whole row of dims, without groups")
        if self.unbiased and any(one.scales_per_group != 1 for one in infos):
            raise SpecError(f"{self}: +unbiased is for formats without a zero point")

    @classmethod
    def parse(cls, text: str) -> KVStorageSpec:
        """Read `int4-g64+had128`, `int4-b64+center32`, `bf16` …; `str` is the inverse.

        Raises SpecError on any other text.
        """
        head, *stages = text.split("+")
        name, options = split_format(head, _FORMATS)
        group, block = take(options, f"g({_COUNT})"), take(options, f"b({_COUNT})")
        hadamard, center = take(stages, f"had({_COUNT})"), take(stages, f"center({_COUNT})")
        pca = take(stages, rf"pca({_COUNT}-.*)")
        clip, unbiased = take(stages, f"clip({_COUNT})"), take(stages, "(unbiased)")
        refuse_rest(text, name, options, ["gGROUP", "bTOKENS"], stages, _STAGES)
        directions, _, pca_format = (pca or "").partition("-")
        return cls(
            name,
            group_size=_count(group),
            block_tokens=_count(block),
            hadamard_block=_count(hadamard) or 0,
            center_tokens=_count(center),
            pca=PCASpec(int(directions), pca_format) if pca else None,
            clip_percent=_count(clip),
            unbiased=unbiased is not None,
        )

    def __str__(self) -> str:
        parts = [
            self.format,
            "" if self.group_size is None else f"-g{self.group_size}",
            "" if self.block_tokens is None else f"-b{self.block_tokens}",
            f"+had{self.hadamard_block}" if self.hadamard_block else "",
            "" if self.center_tokens is None else f"+center{self.center_tokens}",
            "" if self.pca is None else f"+pca{self.pca.directions}-{self.pca.format}",
            "" if self.clip_percent is None else f"+clip{self.clip_percent}",
            "+unbiased" if self.unbiased else "",
        ]
        return "".join(parts)

    @property
    def is_plain(self) -> bool:
        """Whether values are stored as they are, in bf16 or fp32."""
        return self.format in PLAIN

    @property
    def quantizer(self) -> WeightSpec:
        """The format with its group and Hadamard block, as a matrix of rows would be stored."""
        return WeightSpec(self.format, self.group_size, self.hadamard_block)


BF16_STORAGE = KVStorageSpec("bf16")

# A head is stored whole, or the dims that RoPE rotates and the others each in a way of their own.
HeadSpec = tuple[KVStorageSpec] | tuple[KVStorageSpec, KVStorageSpec]


@dataclass(frozen=True)
class LayerKVSpec:
    """How layers of one type store K and V.

    A head given as one storage is stored whole; as two, the dims that RoPE rotates and the others apart. The newest
    `residual_window` tokens and the first `attention_sinks` are not quantized. Raises SpecError for negative ones.
    """

    k: HeadSpec = (BF16_STORAGE,)
    v: HeadSpec = (BF16_STORAGE,)
    residual_window: int = 0
    attention_sinks: int = 0

    def __post_init__(self) -> None:
        if min(self.residual_window, self.attention_sinks) < 0:
            tokens = min(self.residual_window, self.attention_sinks)
            raise SpecError(f"{tokens} is no number of tokens to leave unquantized")

    @property
    def is_plain(self) -> bool:
        """Whether nothing is quantized."""
        return all(storage.is_plain for storage in (*self.k, *self.v))


@dataclass(frozen=True)
class KVSpec:
    """How full and sliding layers store K and V; `KVSpec()` is bf16.

    `name` is only for people: two specs that store the same are equal.
    """

    full: LayerKVSpec = field(default_factory=LayerKVSpec)
    sliding: LayerKVSpec = field(default_factory=LayerKVSpec)
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.sliding.attention_sinks:
            raise SpecError("a sliding layer loses its first tokens, so `sinks` is for full layers alone")
        object.__setattr__(self, "name", self.name or str(self))

    @classmethod
    def parse(cls, text: str) -> KVSpec:
        """Read a named spec, or parts joined by `/`, of which a later one overrides what it covers.

        A part is `WHERE=STORAGE`, or a bare STORAGE for all of K and V, or as the first part a named spec. WHERE is `k`
        or `v`, with `full.` or `sliding.` before it for layers of that type alone, and `.rotated` or `.unrotated` after
        it for the dims of a head that RoPE rotates or for the others. `[full.|sliding.]residual=N` and
        `[full.]sinks=N` leave the newest and the first N tokens unquantized. STORAGE is a `KVStorageSpec`. `str` is the
        inverse. Raises SpecError on any other text, with the near names.
        """
        return NAMED_KV[text] if text in NAMED_KV else _read(text, NAMED_KV)

    def __str__(self) -> str:
        full, sliding = self.full, self.sliding
        if full.k == full.v == sliding.k == sliding.v and len(full.k) == 1:
            parts = [str(full.k[0])]
        else:
            parts = _by_type(_head_parts("k", full.k), _head_parts("k", sliding.k))
            parts += _by_type(_head_parts("v", full.v), _head_parts("v", sliding.v))
        parts += _by_type([f"residual={full.residual_window}"], [f"residual={sliding.residual_window}"])
        parts += [f"sinks={full.attention_sinks}"]
        return "/".join(part for part in parts if not part.endswith("=0"))

    def of(self, layer_type: str) -> LayerKVSpec:
        """How layers of a type (`full_attention`, `sliding_attention`) store K and V."""
        return self.full if layer_type.startswith("full") else self.sliding

    @property
    def is_plain(self) -> bool:
        """Whether nothing is quantized."""
        return self.full.is_plain and self.sliding.is_plain


def _read(text: str, named: Mapping[str, KVSpec]) -> KVSpec:
    spec = KVSpec()
    for index, part in enumerate(text.split("/")):
        place, equals, value = part.partition("=")
        if equals:
            spec = _changed(spec, place, value)
        elif index == 0 and part in named:
            spec = named[part]
        elif part in named:
            raise SpecError(f"kv={text}: the named spec {part} must come first")
        elif part.startswith(tuple(_FORMATS)):
            storage = KVStorageSpec.parse(part)
            spec = _on_layers(spec, None, k=(storage,), v=(storage,))
        else:
            raise SpecError(unknown("KV spec", part, named))
    return replace(spec, name=text)


def _changed(spec: KVSpec, place: str, value: str) -> KVSpec:
    """The spec after the part `place=value`."""
    if tokens := _TOKENS.fullmatch(place):
        layer_type, which = tokens[1], tokens[2]
        if not re.fullmatch("[0-9]{1,9}", value):
            raise SpecError(f"{place}={value}: {value!r} is not a number of tokens")
        if which == "residual":
            return _on_layers(spec, layer_type, residual_window=int(value))
        return _on_layers(spec, layer_type or "full", attention_sinks=int(value))
    if not (where := _WHERE.fullmatch(place)):
        raise SpecError(unknown("place of K or V", place, [*_PLACES, "residual", "sinks"]))
    layer_type, side, dims = where[1], where[2], where[3]
    storage = KVStorageSpec.parse(value)
    for one in _LAYER_TYPES if layer_type is None else (layer_type,):
        head = getattr(getattr(spec, one), side)
        spec = _on_layers(spec, one, **{side: _head_with(head, dims, storage)})
    return spec


def _head_with(head: HeadSpec, dims: str | None, storage: KVStorageSpec) -> HeadSpec:
    if dims is None:
        return (storage,)
    rotated, unrotated = head[0], head[-1]
    return (storage, unrotated) if dims == "rotated" else (rotated, storage)


def _on_layers(spec: KVSpec, layer_type: str | None, **changes: HeadSpec | int) -> KVSpec:
    for one in _LAYER_TYPES if layer_type is None else (layer_type,):
        changed: LayerKVSpec = replace(getattr(spec, one), **changes)
        spec = replace(spec, **{one: changed}, name="")
    return spec


def _head_parts(side: str, head: HeadSpec) -> list[str]:
    if len(head) == 1:
        return [f"{side}={head[0]}"]
    return [f"{side}.rotated={head[0]}", f"{side}.unrotated={head[1]}"]


def _by_type(full: list[str], sliding: list[str]) -> list[str]:
    """Parts, written once where both layer types have the same."""
    if full == sliding:
        return full
    return [*(f"full.{part}" for part in full), *(f"sliding.{part}" for part in sliding)]


def _count(text: str | None) -> int | None:
    return None if text is None else int(text)


# Texts that `KVSpec.parse` reads, by name. The original's formats take their scale from the largest value alone.
_NAMED = {
    "bf16": "bf16",
    "fp32": "fp32",
    "int8": "int8",
    "int4": "int4",
    "int4+had": "int4+had512",
    "per-channel-k": "k=int4-b64/v=int4",
    "original": "absmax4/full.k.unrotated=absmax2/full.v.unrotated=absmax2",
    "original+ls": "int4/full.k.unrotated=int2/full.v.unrotated=int2",
    # V has no dims that RoPE rotates: its split only brings the total to that of the original.
    "original-inverted": "int4/full.k.rotated=int2/full.k.unrotated=int3/full.v.rotated=int3/full.v.unrotated=int2",
    # Found with benchmarks/search_kv.py on the small model's calibration text.
    "p-rope": "full.k.rotated=codebook4-b64/full.k.unrotated=codebook2+had512+center128+pca8-int5+unbiased"
    "/full.v=codebook2-b128+center128+pca12-codebook4/full.sinks=1/sliding.k=codebook4+had512/sliding.v=codebook4+had512",
    "p-rope-4": "full.k.rotated=affine5-b128/full.k.unrotated=codebook3+had512+center128+pca12-int6+unbiased"
    "/full.v=affine4-b128+had512/full.sinks=2/sliding.k=codebook4+had512/sliding.v=codebook4+had512",
}

NAMED_KV: Mapping[str, KVSpec] = MappingProxyType(
    {name: replace(_read(text, {}), name=name) for name, text in _NAMED.items()}
)
