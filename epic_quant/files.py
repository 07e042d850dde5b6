"""Text files, whatever wrote them, and files that are written whole or not at all."""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# Bytes of an element, by the names that safetensors has for dtypes.
_ELEMENT_NBYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


def user_path(text: str | Path) -> Path:
    """A path as people write it: `~` is the home folder, also where no shell has seen it, as in `--text=~/a.txt`."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        return Path(text)


def open_text(path: Path) -> TextIO:
    """A text in UTF-8, after its byte-order mark where it has one, with every line break as `\\n`.

    Raises OSError, and ValueError where it is UTF-16 or UTF-32; reading raises ValueError where it is not UTF-8.
    """
    file = path.open("rb")
    start = file.peek(4)[:4]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start:
        file.close()
        raise ValueError("it is UTF-16 or UTF-32, or no text; save it as UTF-8")
    return io.TextIOWrapper(file, encoding="utf-8-sig")


def read_text(path: Path) -> str:
    """All of a text; raises OSError and ValueError as `open_text`."""
    with open_text(path) as file:
        return file.read()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A place beside `path` to write at, which is renamed to `path` at the end of the block.

    After an error nothing is left of it, and what `path` was before is still there. Whatever is opened in the block
    must be closed in it. Raises OSError where the folder cannot be written to.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent, ignore_cleanup_errors=True) as beside:
        unfinished = Path(beside, path.name)
        yield unfinished
        os.replace(unfinished, path)


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor in a .safetensors file, whose dtype is one of its names."""
    return _ELEMENT_NBYTES[dtype] * math.prod(shape)


@contextmanager
def safetensors_writer(
    path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Write a .safetensors file whose tensors need not be in RAM together, atomically.

    `tensors` has the dtype (`F32`, `U8` …) and shape of each, in the order of their bytes. The block gets a function
    that writes the next bytes, in pieces of any size. Raises ValueError where they come to more or less than the
    header says, and OSError.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + tensor_nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with atomic(path) as unfinished:
        with unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            first = file.tell()

            def write(data: bytes | memoryview) -> None:
                file.write(data)

            yield write
            written = file.tell() - first
        if written != end:
            raise ValueError(f"{path}: {written} bytes of tensors, but its header says {end}")
