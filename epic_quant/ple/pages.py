"""What the system holds in memory: the pages of a file and of this process. Each is None where it is not reported."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def evict(path: Path) -> bool | None:
    """Have the system drop a file's pages from memory; whether they are all gone, which is looked up."""
    if not hasattr(os, "posix_fadvise"):
        return None
    with path.open("rb") as file:
        # Pages that wait to be written are not dropped.
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    held = cached_nbytes(path)
    return None if held is None else held == 0


def cached_nbytes(path: Path) -> int | None:
    """Bytes of a file that are in the system's page cache, by mincore."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, TypeError, AttributeError):
        return None
    size = path.stat().st_size
    if not size:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), pages)
        del start  # the map cannot be closed while anything points into it
    return None if failed else sum(page & 1 for page in bytes(pages)) * mmap.PAGESIZE


def anonymous_nbytes() -> int | None:
    """Resident bytes of this process that belong to no file."""
    return _number(Path("/proc/self/smaps_rollup"), "Anonymous:", 1024)


def read_nbytes() -> int | None:
    """Bytes that this process has had fetched from a disk, up to now."""
    return _number(Path("/proc/self/io"), "read_bytes:", 1)


def _number(path: Path, name: str, unit: int) -> int | None:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * unit for line in lines if line.startswith(name)), None)
