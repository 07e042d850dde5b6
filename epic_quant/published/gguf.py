"""GGUF, of llama.cpp: metadata, then the place of every tensor, then their bytes.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here and not by gguf-py's
reader, which makes objects of every one of a tokenizer's tokens and merges, and says little where a file is cut short.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epic_quant.errors import CheckpointError, unknown
from epic_quant.gemma4.gguf_metadata import ROPE_FACTORS
from epic_quant.gemma4.gguf_names import ARCHITECTURE, canonical_name
from epic_quant.published.matrix import PublishedMatrix
from epic_quant.published.source import PublishedFile, StoredTensor, one_to_one
from epic_quant.quant import Weight, from_tensors
from epic_quant.spec import FORMATS, PUBLISHED, WeightSpec

MAGIC = b"GGUF"

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# The format's own limit.
_MOST_DIMS = 4
# More than any model has: longer arrays are a tokenizer's.
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies; its shape as here, rows first."""

    data: mmap.mmap
    offset: int
    shape: tuple[int, ...]
    type_id: int


@dataclass(frozen=True)
class _Header:
    path: Path
    metadata: dict[str, Any]
    places: dict[str, _Place]


def read(path: Path) -> PublishedFile:
    """The text tensors of a GGUF file, and of its other parts where it is one of several.

    Raises CheckpointError for a file that is damaged, of another architecture or of a type unknown here, and where a
    part is missing.
    """
    headers = [_read_header(part) for part in _parts(path)]
    architecture = headers[0].metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"{path}: its architecture is {architecture!r}; expected {ARCHITECTURE}")
    places: dict[str, _Place] = {}
    for header in headers:
        for name, place in header.places.items():
            if name in places:
                raise CheckpointError(f"{header.path}: {name} is in another part too")
            places[name] = place
    if "output.weight" in places:
        raise CheckpointError(f"{path}: it has output.weight, a head of its own; expected the embedding as the head")
    names = one_to_one(((found, name) for name in places if (found := canonical_name(name)) is not None), str(path))
    if strange := [name for name in places if name.startswith("blk.") and name not in names.values()]:
        raise CheckpointError(f"{path}: {strange[0]} is no tensor of a dense Gemma 4 layer")
    types = _type_names()
    stored = {name: _stored(path, name, places[name], types) for name in names.values()}
    for header in headers:
        _check_apart(header, stored)
    metadata = {key.removeprefix(f"{ARCHITECTURE}."): value for key, value in headers[0].metadata.items()}
    if (rope := places.get(ROPE_FACTORS)) is not None and len(rope.shape) == 1 and rope.shape[0]:
        factors = _stored(path, ROPE_FACTORS, rope, types).read()
        assert isinstance(factors, Tensor)
        metadata[ROPE_FACTORS] = factors.tolist()
    return PublishedFile(
        source=str(path),
        kind="GGUF",
        files=tuple(header.path for header in headers),
        tensors={canonical: stored[name] for canonical, name in names.items()},
        others=tuple(sorted(places.keys() - {*names.values(), ROPE_FACTORS})),
        metadata=metadata,
    )


def _check_apart(header: _Header, stored: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError where a tensor begins before the end of another one."""
    end, before = 0, ""
    for name, place in sorted(header.places.items(), key=lambda item: item[1].offset):
        if place.offset < end:
            raise CheckpointError(f"{header.path}: {name} begins in {before}, before byte {end:,}")
        end, before = place.offset + (stored[name].nbytes if name in stored else 0), name


def _type_names() -> dict[int, str]:
    """The types by their number in a file."""
    try:
        from gguf import GGMLQuantizationType
    except ImportError as error:
        raise CheckpointError("a GGUF file needs the extra gguf: pip install 'epic-quant[gguf]'") from error
    return {one.value: one.name.lower() for one in GGMLQuantizationType}


def _parts(path: Path) -> list[Path]:
    """All parts of a file, in order, by the name that llama.cpp splits into; the file alone where it is whole."""
    count = _read_header(path, metadata_only=True).metadata.get("split.count", 0)
    if not isinstance(count, int):
        raise CheckpointError(f"{path}: its metadata says {count!r} of split.count; expected a number of parts")
    if count <= 1:
        return [path]
    if (match := _PART.fullmatch(path.name)) is None or int(match[3]) != count:
        raise CheckpointError(f"{path}: one of {count} parts; expected a name that ends with -0000N-of-{count:05}.gguf")
    parts = [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for number, part in enumerate(parts):
        if not part.is_file():
            raise CheckpointError(f"{part}: this part is missing, one of {count} of {path.name}")
        if _read_header(part, metadata_only=True).metadata.get("split.no") != number:
            raise CheckpointError(f"{part}: by its metadata it is not part {number + 1} of {count}")
    return parts


def _read_header(path: Path, metadata_only: bool = False) -> _Header:
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    try:
        return _parse(path, _Cursor(data), metadata_only)
    except (struct.error, IndexError, OverflowError) as error:
        raise CheckpointError(f"{path}: truncated or damaged GGUF file of {len(data):,} bytes") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: damaged GGUF file: a name in its header is not UTF-8") from error


class _Cursor:
    """Reads a mapped file from its start on; struct.error or IndexError at its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def skip(self, nbytes: int) -> None:
        if nbytes > len(self.data) - self.at:
            raise IndexError
        self.at += nbytes

    def string(self) -> str:
        begin = self.at + 8
        self.skip_string()
        return self.data[begin : self.at].decode()

    def skip_string(self) -> None:
        self.skip(self.number("Q"))

    def value(self, kind: int) -> Any:
        """A value of the metadata; None for strings in arrays and what has more values than a model has layers."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise IndexError
            return self.number(_SCALARS[kind])
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            begin = self.at
            self.skip(count * struct.calcsize(_SCALARS[item]))
            if count <= _MOST_LAYERS:
                return list(struct.unpack_from(f"<{count}{_SCALARS[item]}", self.data, begin))
        elif item == _STRING:
            for _ in range(count):
                self.skip_string()
        else:
            raise IndexError
        return None


def _parse(path: Path, cursor: _Cursor, metadata_only: bool) -> _Header:
    if cursor.data[:4] != MAGIC:
        raise CheckpointError(f"{path}: no GGUF file; it begins with {cursor.data[:4]!r}")
    cursor.skip(4)
    if (version := cursor.number("I")) not in (2, 3):
        raise CheckpointError(f"{path}: version {version} of GGUF; expected 2 or 3, little-endian")
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    if metadata_only:
        return _Header(path, metadata, {})
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name, num_dims = cursor.string(), cursor.number("I")
        if name in entries:
            raise CheckpointError(f"{path}: tensor {name!r} is in it twice")
        if num_dims > _MOST_DIMS:
            raise CheckpointError(f"{path}: tensor {name!r} has {num_dims} dims; expected {_MOST_DIMS} at most")
        dims = tuple(cursor.number("Q") for _ in range(num_dims))
        entries[name] = dims[::-1], cursor.number("I"), cursor.number("Q")  # in the file columns come first
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{path}: its alignment is {alignment!r}; expected a positive number")
    start = -(-cursor.at // alignment) * alignment
    places = {
        name: _Place(cursor.data, start + offset, shape, type_id) for name, (shape, type_id, offset) in entries.items()
    }
    return _Header(path, metadata, places)


def _stored(path: Path, name: str, place: _Place, types: dict[int, str]) -> StoredTensor:
    """A tensor, once it is checked to be of a known type and to lie in the file."""
    known = [*_DTYPES, *(one for one, info in {**FORMATS, **PUBLISHED}.items() if info.block_nbytes)]
    type_name = types.get(place.type_id, f"number {place.type_id}")
    if type_name not in known:
        raise CheckpointError(f"{path}: {name}: {unknown('ggml type', type_name, known)}")
    spec, numel = WeightSpec(type_name), math.prod(place.shape)
    if type_name in _DTYPES:
        nbytes = numel * _DTYPES[type_name].itemsize
    else:
        if len(place.shape) != 2 or spec.misfit(place.shape[1]):
            raise CheckpointError(f"{path}: {name}: {type_name} does not fit a tensor of shape {list(place.shape)}")
        nbytes = numel // spec.info.block_size * spec.info.block_nbytes
    if place.offset + nbytes > len(place.data):
        raise CheckpointError(
            f"{path}: truncated: {name} ends at byte {place.offset + nbytes:,}, the file at byte {len(place.data):,}"
        )
    return StoredTensor(place.shape, nbytes, spec, partial(_mapped, place, spec, nbytes))


def _mapped(place: _Place, spec: WeightSpec, nbytes: int) -> Weight:
    """The tensor as it lies in the mapped file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        data = torch.frombuffer(place.data, dtype=torch.uint8, count=nbytes, offset=place.offset)
    if spec.format in _DTYPES:
        return data.view(_DTYPES[spec.format]).view(place.shape)
    rows, cols = place.shape
    blocks = data.view(rows, -1)
    if spec.info.is_published:
        return PublishedMatrix({"blocks": blocks}, cols, spec, partial(_decode, spec.format.upper()))
    return from_tensors(spec, {"blocks": blocks}, (rows, cols))


def _decode(type_name: str, stored: dict[str, Tensor]) -> Tensor:
    from gguf import GGMLQuantizationType, dequantize

    return torch.from_numpy(dequantize(stored["blocks"].numpy(), GGMLQuantizationType[type_name]))
