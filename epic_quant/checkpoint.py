"""Named tensors of a checkpoint on disk, read lazily from a file, a folder, shards or a Hugging Face hub id."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from epic_quant.errors import CheckpointError, ConfigError, TokenError, unknown
from epic_quant.files import read_text, user_path

# The dtypes of the safetensors format that torch has too.
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


# The format's own limit, so that a wild length does not become a wild allocation.
_MAX_HEADER_NBYTES = 100_000_000

_SAMPLE_NBYTES = 64


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor's bytes lie: `offset` counts from the start of the file at `path`, little-endian, row-major."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The tensor's size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of one checkpoint by name, mapped and not loaded: a page is read when a value in it is.

    A context manager; what comes from the headers alone (`names`, `shape`, `location` …) stays available once
    it is closed. The files must not change while it is open.
    """

    def __init__(self, source: str, files: dict[Path, list[str]], config: Path | None, tokenizer: Path | None) -> None:
        """Use `open`. `files` maps each .safetensors file to the tensors that an index promises to be in it."""
        self.source = source
        self._config_path = config
        self.tokenizer_path = tokenizer
        self._locations: dict[str, TensorLocation] = {}
        self._views: dict[Path, Callable[[str], Tensor]] = {}
        self._closed = False
        for path, promised in files.items():
            locations = _read_header(path)
            for name in promised:
                if name not in locations:
                    raise CheckpointError(f"{path}: the index promises tensor {name!r} in it, but it is not there")
            # The index decides: a tensor that it names in another shard, or not at all, is none of this one's.
            self._locations |= {name: locations[name] for name in promised} if promised else locations
            self._views[path] = _map(path, locations)
        self.names = tuple(sorted(self._locations))

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        config: str | Path | None = None,
        tokenizer: str | Path | None = None,
        download: bool = False,
    ) -> Checkpoint:
        """Opens a .safetensors file, a folder with one or with shards and their index, or a hub id (owner/name).

        A hub id is looked up in the local Hugging Face cache; with `download=True` what is missing there is fetched
        through the extra `hub`. `config` and `tokenizer` replace the config.json and tokenizer.json beside the weights.
        Raises CheckpointError for missing or damaged files.
        """
        if not str(source).strip():
            raise CheckpointError("the name of the checkpoint is empty; expected a file, a folder or a hub id")
        place = user_path(source)
        text = place.as_posix()
        # os.path: pathlib raises OSError where a name is too long, or a folder may not be looked into.
        if not os.path.exists(place) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)", text):
            place = _hub_snapshot(text, download)
        files = _weight_files(place)
        folder = place if os.path.isdir(place) else place.parent
        return cls(
            text, files, _companion(folder, "config.json", config), _companion(folder, "tokenizer.json", tokenizer)
        )

    def __reduce__(self) -> tuple[Callable[..., Checkpoint], tuple[object, ...]]:
        """A copy in another process opens the same files."""
        return _open_again, (self.source, self._config_path, self.tokenizer_path)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files. A view still held keeps its file mapped, and stays valid, until it is deleted."""
        self._views.clear()
        self._closed = True

    def __contains__(self, name: object) -> bool:
        return name in self._locations

    def tensor(self, name: str) -> Tensor:
        """The tensor in the file's shape and dtype: a view of the mapped file, no copy.

        Do not write to it: a write never reaches the file, but shows in other views of it or ends the process.
        """
        location = self.location(name)
        self._check_open()
        return self._views[location.path](name)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """A copy of the rows `ids` (integers, flattened to [n]) of a [rows, cols] tensor, as [n, cols] in its dtype.

        Only pages that hold these rows are touched. Raises TokenError when an id is no integer or out of range.
        """
        table = self.tensor(name)
        if table.ndim != 2:
            raise CheckpointError(
                f"{self.source}: {name!r} has no rows to take: shape {self.shape(name)}, expected 2 dims"
            )
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise TokenError(f"ids of rows of {name!r} must be integers, not {ids.dtype}")
        ids = ids.reshape(-1).to("cpu", torch.int64)
        wrong = ids[(ids < 0) | (ids >= len(table))]
        if len(wrong):
            raise TokenError(f"id {int(wrong[0])} is out of range: {name!r} has rows 0 to {len(table) - 1}")
        return table.index_select(0, ids)

    def location(self, name: str) -> TensorLocation:
        """Where the tensor lies, for positioned reads; raises CheckpointError with similar names if there is none."""
        if name not in self._locations:
            raise CheckpointError(f"{self.source}: {unknown('tensor', name, self.names)}")
        return self._locations[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; () for a scalar."""
        return self.location(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that the file stores."""
        return self.location(name).dtype

    def nbytes(self, name: str) -> int:
        """The tensor's size in the file."""
        return self.location(name).nbytes

    @property
    def config_json(self) -> dict[str, Any]:
        """The config.json as parsed; raises ConfigError when there is none or it is no JSON object."""
        if self._config_path is None:
            raise ConfigError(f"{self.source}: no config.json beside the weights; name one with config=")
        try:
            return _parse_object(read_text(self._config_path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._config_path}: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify this checkpoint, from some 128 bytes read for each tensor.

        A SHA-256 over every file's size, header, and the 64 bytes at the start and in the middle of each tensor.
        Paths, file names and times play no part. It does not catch a change of values outside of those bytes, so it
        distinguishes models, but does not prove a file undamaged; the same tensors in other shards differ.
        """
        self._check_open()
        digests = []
        for path in self._views:
            here = [location for location in self._locations.values() if location.path == path]
            digests.append(_digest(path, here))
        return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]

    def _check_open(self) -> None:
        if self._closed:
            raise CheckpointError(f"{self.source}: this checkpoint is closed")


def _open_again(source: str, config: Path | None, tokenizer: Path | None) -> Checkpoint:
    return Checkpoint.open(source, config=config, tokenizer=tokenizer)


def _weight_files(place: Path) -> dict[Path, list[str]]:
    """The .safetensors files of a file or folder, each with the tensors that an index promises to be in it."""
    if os.path.isfile(place):
        if place.suffix != ".safetensors":
            raise CheckpointError(f"{place}: expected a .safetensors file or a folder with one")
        return {place: []}
    if not os.path.isdir(place):
        raise CheckpointError(f"{place}: no such file or folder, and no hub id (owner/name)")
    if (place / "model.safetensors").is_file():
        return {place / "model.safetensors": []}
    if (place / "model.safetensors.index.json").is_file():
        return _shards(place / "model.safetensors.index.json")
    found = sorted(path for path in place.glob("*.safetensors") if path.is_file())
    if len(found) != 1:
        what = f"{len(found)} .safetensors files and no index" if found else "no weights"
        raise CheckpointError(
            f"{place}: {what} in this folder; expected model.safetensors, or shards and model.safetensors.index.json"
        )
    return {found[0]: []}


def _shards(index: Path) -> dict[Path, list[str]]:
    try:
        weight_map = _parse_object(read_text(index)).get("weight_map")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map from tensors to files")
    files: dict[Path, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: tensor {name!r} is in {shard!r}, expected the name of a file in this folder"
            )
        files.setdefault(index.parent / shard, []).append(name)
    for path, names in files.items():
        if not os.path.isfile(path):  # False for a name that is too long, too
            raise CheckpointError(f"{path}: this shard is missing; {index.name} expects it to hold {names[0]!r}")
    return files


def _companion(folder: Path, name: str, given: str | Path | None) -> Path | None:
    if given is None:
        return folder / name if (folder / name).is_file() else None
    path = user_path(given)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file, expected a {name}")
    return path


def _parse_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in `text`; raises ValueError with a message that follows a path and a colon."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
        return content

    try:
        content = json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=without_repeats)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found {type(content).__name__}")
    return content


def _read_header(path: Path) -> dict[str, TensorLocation]:
    """Every tensor of a .safetensors file, checked to fill the file without a hole or an overlap.

    The format: 8 bytes with the header's length, the header in JSON, and the bytes of the tensors, to which
    `data_offsets` are relative (https://huggingface.co/docs/safetensors).
    """
    try:
        with path.open("rb") as file:
            file_nbytes = os.fstat(file.fileno()).st_size
            header_nbytes = int.from_bytes(file.read(8), "little")
            data_start = 8 + header_nbytes
            if file_nbytes < 8:
                raise CheckpointError(f"{path}: {file_nbytes} bytes are no .safetensors file; it is empty or truncated")
            if data_start > file_nbytes or header_nbytes > _MAX_HEADER_NBYTES:
                raise CheckpointError(
                    f"{path}: its first 8 bytes give a header of {header_nbytes} bytes in a file of {file_nbytes}; "
                    "it is truncated or no .safetensors file"
                )
            header = _parse_object(file.read(header_nbytes))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: header: {error}") from error

    header.pop("__metadata__", None)
    locations = {name: _checked_location(path, data_start, name, entry) for name, entry in header.items()}
    end, before = data_start, "the header"
    for name, location in sorted(locations.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if location.offset != end:
            fault = "overlaps" if location.offset < end else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {name!r} {fault} {before}: it begins at byte {location.offset}, expected {end}"
            )
        end, before = end + location.nbytes, repr(name)
    if end != file_nbytes:
        fault = "truncated" if end > file_nbytes else "overlong"
        raise CheckpointError(
            f"{path}: {fault} file of {file_nbytes} bytes; by its header it must end with {before} at byte {end}"
        )
    return locations


def _checked_location(path: Path, data_start: int, name: str, entry: Any) -> TensorLocation:
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end]} if all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            pass
        case _:
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected dtype, shape and data_offsets, found {entry!r:.80}"
            )
    if code not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r}: {unknown('dtype', code, DTYPES)}")
    location = TensorLocation(path, data_start + begin, tuple(shape), DTYPES[code])
    if end - begin != location.nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r}: {code} {shape} takes {location.nbytes} bytes, its offsets hold {end - begin}"
        )
    return location


def _map(path: Path, locations: dict[str, TensorLocation]) -> Callable[[str], Tensor]:
    """Maps the file; the result gives views of its tensors by name."""
    try:
        get_tensor: Callable[[str], Tensor] = safe_open(path, framework="pt").get_tensor
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, RuntimeError):
        # safetensors maps the file as private and writable. Linux counts that as memory that may be needed, and
        # refuses a file larger than RAM and swap together; so does Windows. A read-only map costs nothing.
        return _map_read_only(path, locations)
    return get_tensor


def _map_read_only(path: Path, locations: dict[str, TensorLocation]) -> Callable[[str], Tensor]:
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be mapped ({error.strerror})") from error

    def view(name: str) -> Tensor:
        location = locations[name]
        count = math.prod(location.shape)
        if count == 0:
            return torch.empty(location.shape, dtype=location.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            flat = torch.frombuffer(mapped, dtype=location.dtype, count=count, offset=location.offset)
        return flat.view(location.shape)

    return view


def _digest(path: Path, locations: Iterable[TensorLocation]) -> bytes:
    """SHA-256 of a file's size, its header, and samples of its tensors in the order of their offsets."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
        length = file.read(8)
        digest.update(length + file.read(int.from_bytes(length, "little")))
        for location in sorted(locations, key=lambda location: location.offset):
            for start in (0, location.nbytes // 2):
                file.seek(location.offset + start)
                digest.update(file.read(min(_SAMPLE_NBYTES, location.nbytes - start)))
    return digest.digest()


def _hub_snapshot(repo_id: str, download: bool) -> Path:
    """The folder of a hub id in the local cache, laid out as models--owner--name/refs/main and snapshots/REVISION."""
    cache = _hub_cache()
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    revision = repo / "refs" / "main"
    snapshot = repo / "snapshots" / revision.read_text("utf-8").strip() if revision.is_file() else None
    try:
        if snapshot is not None:
            _weight_files(snapshot)
            return snapshot
        fault = f"neither a path nor in the Hugging Face cache {cache}"
    except CheckpointError as error:
        fault = f"incomplete in the Hugging Face cache ({error})"
    if not download:
        raise CheckpointError(
            f"{repo_id}: {fault}; get it with --download (download=True in Python), or with: hf download {repo_id}"
        )
    return _download(repo_id, cache)


def _hub_cache() -> Path:
    """The folder that huggingface_hub keeps what it downloads in, by the same variables in the same order."""
    environ = os.environ
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or Path(home, "hub")
    return user_path(os.path.expandvars(cache))


def _download(repo_id: str, cache: Path) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{repo_id}: a download needs the extra hub: pip install 'epic-quant[hub]', or use: hf download {repo_id}"
        ) from error
    try:
        return Path(
            snapshot_download(
                repo_id,
                cache_dir=cache,
                allow_patterns=["*.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"],
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:
        # What is raised depends on the network layer below huggingface_hub and differs from version to version.
        raise CheckpointError(f"{repo_id}: the download failed: {' '.join(str(error).split())}") from error
