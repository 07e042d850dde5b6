"""Rows of a matrix in a file, read when they are needed: by positioned reads, or through a mapped view."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from epic_quant.checkpoint import Checkpoint, TensorLocation
from epic_quant.errors import CheckpointError
from epic_quant.ple.residency import Ids

# Reads in flight: more than a laptop's SSD needs to be busy, few enough that threads cost little.
NUM_THREADS = 16


class RowReader(Protocol):
    """Reads rows as the bytes that the file has."""

    bytes_read: int

    def read(self, ids: Ids) -> Tensor:
        """Rows `ids` [n], distinct and ascending, as uint8 [n, row bytes]; threads may call it at the same time."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class PositionedRows:
    """Reads of just the rows asked for, adjacent ones in one, several in flight.

    Raises CheckpointError where the file has become shorter or cannot be read.
    """

    def __init__(self, location: TensorLocation, num_threads: int = NUM_THREADS) -> None:
        self.bytes_read = 0
        self._path, self._offset = location.path, location.offset
        self._row_nbytes = location.nbytes // location.shape[0]
        try:
            # Read without a buffer of Python's own, and without the system's guess at what comes next.
            self._file = location.path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be read ({error.strerror})") from error
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), location.offset, location.nbytes, os.POSIX_FADV_RANDOM)
        self._lock = threading.Lock()
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, "ple-read") if num_threads > 1 else None

    def read(self, ids: Ids) -> Tensor:
        """Rows `ids` [n], distinct and ascending, as uint8 [n, row bytes]."""
        rows = torch.empty(len(ids), self._row_nbytes, dtype=torch.uint8)
        buffer = rows.view(-1).numpy().data
        runs = list(_runs(ids))
        if self._pool is None or len(runs) < 2:
            self._read_runs(buffer, ids, runs)
        else:
            # One task for each thread and not for each run, since handing over a task takes as long as a short read.
            shares = [runs[start :: self._num_threads] for start in range(min(self._num_threads, len(runs)))]
            for done in [self._pool.submit(self._read_runs, buffer, ids, share) for share in shares]:
                done.result()
        with self._lock:
            self.bytes_read += buffer.nbytes
        return rows

    def _read_runs(self, buffer: memoryview, ids: Ids, runs: list[tuple[int, int]]) -> None:
        size = self._row_nbytes
        for start, stop in runs:
            part, position = buffer[start * size : stop * size], self._offset + int(ids[start]) * size
            try:
                while part.nbytes:
                    count = self._read_at(part, position)
                    if count == 0:
                        raise CheckpointError(f"{self._path}: became shorter while it was in use: no byte {position}")
                    part, position = part[count:], position + count
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self._path}: cannot be read ({error})") from error

    def _read_at(self, part: memoryview, position: int) -> int:
        """Fill a part of the buffer from a place in the file, as far as one call of the system does; bytes read."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [part], position)
        if hasattr(os, "pread"):
            data = os.pread(self._file.fileno(), part.nbytes, position)
            part[: len(data)] = data
            return len(data)
        with self._lock:
            self._file.seek(position)
            return self._file.readinto(part) or 0

    def close(self) -> None:
        """Close the file and stop the threads."""
        if self._pool is not None:
            self._pool.shutdown()
        self._file.close()


class MappedRows:
    """Copies out of the checkpoint's mapped view, a page fault at a time.

    The file's length is looked at before each read, and CheckpointError raised where it has become shorter. Should that
    happen during the read itself, the system ends the process; positioned reads have no such moment.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.bytes_read = 0
        self._location = checkpoint.location(name)
        self._table = checkpoint.tensor(name).view(torch.uint8)
        self._lock = threading.Lock()

    def read(self, ids: Ids) -> Tensor:
        """Rows `ids` [n], distinct and ascending, as uint8 [n, row bytes]."""
        path, end = self._location.path, self._location.offset + self._location.nbytes
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        if size < end:
            raise CheckpointError(f"{path}: became shorter while it was in use: {size} bytes, expected at least {end}")
        rows = self._table.index_select(0, torch.from_numpy(ids))
        with self._lock:
            self.bytes_read += rows.nbytes
        return rows

    def close(self) -> None:
        """Drop the view."""
        del self._table


def _runs(ids: Ids) -> Iterator[tuple[int, int]]:
    """Where in ascending ids each run of adjacent ones begins and ends."""
    return pairwise([0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)] if len(ids) else [])
