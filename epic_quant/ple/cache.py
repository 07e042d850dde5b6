"""`PLERowCache`: the rows of the PLE table that tokens ask for, of which some are hot, that is kept in RAM."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import SpecError, TokenError, unknown
from epic_quant.ple.packing import PackedRows, PlainRows, RowFormat, Table, open_packed
from epic_quant.ple.reading import NUM_THREADS, MappedRows, PositionedRows, RowReader
from epic_quant.ple.residency import Ids, Residency
from epic_quant.spec import BF16, WeightSpec

READS = ("positioned", "mapped")


@dataclass(frozen=True)
class CacheStats:
    """Counts of a cache's lookups. Lookups are of tokens, one after another, whatever batches they came in.

    A batch reads a row at most once, so `bytes_read`, in which the rows hot at the start are included, may be less
    than that of `misses` rows. `resident_nbytes` is of the rows that are hot now.
    """

    hits: int
    misses: int
    evictions: int
    resident_nbytes: int
    bytes_read: int

    @property
    def hit_rate(self) -> float:
        """Hits per lookup; NaN before the first."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else float("nan")


class PLERowCache:
    """Rows of a checkpoint's PLE table by token id: one row serves all layers, so a token is looked up once.

    At most `capacity_rows` rows, or as many as fit `capacity_nbytes`, are hot, kept by `residency`: `static`, `lru`,
    `static+lru` or `w-lrfu` (see `ple.residency`). The first of `initial_ids` [n], in the order of their worth, are hot
    from the start, and those that are static stay so; unless given, these are the lowest ids, and no others are hot.
    For the ids of Gemma's vocabulary of 262,144 there is a list that is made from text: `ple.frequent_ids()`.

    With `packed`, a file that `pack_table` made, rows are read from it, kept packed and decoded on the way out. With a
    `spec` other than bf16 and no such file, cold rows are read from the checkpoint and quantized each time, which takes
    far longer than the read; rows of a table in fp16, fp32 or fp64 are rounded to bf16 likewise. `reads` is
    `positioned` or `mapped`; the second raises no error where a file shrinks in the middle of a read.

    A context manager. Threads may look up at the same time. Raises SpecError on settings that do not fit the table,
    and CheckpointError or ConfigError on a table that is not as the config says.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        capacity_rows: int | None = None,
        capacity_nbytes: int | None = None,
        residency: str = "lru",
        initial_ids: Tensor | None = None,
        spec: WeightSpec = BF16,
        packed: str | Path | None = None,
        reads: str = "positioned",
        num_threads: int = NUM_THREADS,
    ) -> None:
        if reads not in READS:
            raise SpecError(unknown("way to read", reads, READS))
        self._table = table = Table.of(checkpoint)
        self._num_rows, self._shape = table.num_rows, (table.num_layers, table.dim)
        self._format, self._reader, self._quantizes = _source(table, spec, packed, reads, num_threads)
        self._hits = self._misses = self._evictions = 0
        self._lock = threading.Lock()
        try:
            self.capacity_rows = _capacity(capacity_rows, capacity_nbytes, self._format.row_nbytes)
            initial = None if initial_ids is None else _distinct(self._checked(initial_ids))
            self._residency = Residency.named(residency, table.num_rows, self.capacity_rows, initial)
            self._hot = torch.empty(self.capacity_rows, self._format.row_nbytes, dtype=torch.uint8)
            # The result of plain rows, so that a hot lookup is one call of torch.
            is_plain = isinstance(self._format, PlainRows)
            self._hot_plain = self._format.decode(self._hot).view(-1, *self._shape) if is_plain else None
            self._load_initial()
        except BaseException:
            self._reader.close()
            raise

    def __enter__(self) -> PLERowCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    @property
    def row_nbytes(self) -> int:
        """Bytes that a hot row takes."""
        return self._format.row_nbytes

    @property
    def stats(self) -> CacheStats:
        """The counts so far."""
        with self._lock:
            resident = self._residency.num_rows * self._format.row_nbytes
            return CacheStats(self._hits, self._misses, self._evictions, resident, self._reader.bytes_read)

    def rows(self, token_ids: Tensor) -> Tensor:
        """Rows of token ids, integers of any shape with n in all: [n, num_layers, dim], a copy.

        The table's own bits where it is in bf16; fp32 where rows are packed, or were rounded to bf16. Raises TokenError
        on ids that are no integers or out of range, and CheckpointError where the file can no longer be read.
        """
        ids = self._checked(token_ids)
        with self._lock:
            slots = self._residency.slot_of[ids]
            all_hot = not len(ids) or slots.min() >= 0
            if all_hot:
                self._residency.touch(ids)
                self._hits += len(ids)
                if self._hot_plain is not None:
                    return self._hot_plain.index_select(0, torch.from_numpy(slots))
                rows = self._hot.index_select(0, torch.from_numpy(slots))
            else:
                hot = slots >= 0
                hot_rows = self._hot.index_select(0, torch.from_numpy(slots[hot]))
        if not all_hot:
            rows = self._with_cold(ids, hot, hot_rows)
        return self._format.decode(rows).view(len(ids), *self._shape)

    def _with_cold(self, ids: Ids, hot: NDArray[np.bool_], hot_rows: Tensor) -> Tensor:
        """All rows [n, row_nbytes] of a batch: the cold ones are read, with no lock held, and then let in."""
        cold, place = np.unique(ids[~hot], return_inverse=True)
        # NumPy copies in this thread; torch's threads would have to meet for every few kilobytes.
        rows = np.empty((len(ids), self._format.row_nbytes), dtype=np.uint8)
        rows[hot] = hot_rows.numpy()
        rows[~hot] = self._read(cold).numpy()[place]
        with self._lock:
            # Other threads may have changed what is hot meanwhile; all rows of the batch are in memory by now.
            outcome = self._residency.look_up(ids)
            self._hits += outcome.hits
            self._misses += len(ids) - outcome.hits
            self._evictions += outcome.evictions
            if outcome.placed:
                position = dict(zip(ids.tolist(), range(len(ids)), strict=True))
                self._hot.numpy()[list(outcome.placed.values())] = rows[[position[row] for row in outcome.placed]]
        return torch.from_numpy(rows)

    def _read(self, ids: Ids) -> Tensor:
        """Distinct, ascending rows out of the file in the format that is kept: uint8 [n, row_nbytes]."""
        rows = self._reader.read(ids)
        if self._quantizes:
            rows = self._format.encode(rows.view(self._table.location.dtype))
        return rows

    def _load_initial(self) -> None:
        ids = np.flatnonzero(self._residency.slot_of >= 0)
        for part in np.array_split(ids, max(1, len(ids) // 1024)):
            if len(part):
                self._hot[torch.from_numpy(self._residency.slot_of[part]).long()] = self._read(part)

    def _checked(self, token_ids: Tensor) -> Ids:
        """Ids as int64 [n]; raises TokenError."""
        if token_ids.dtype != torch.int64 or not token_ids.is_cpu:
            if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
                raise TokenError(f"token ids are {token_ids.dtype}; expected integers")
            token_ids = token_ids.to("cpu", torch.int64)
        ids: Ids = token_ids.reshape(-1).numpy()
        # As unsigned integers negative ids are very large, so one test of the largest id checks both bounds.
        largest = ids.item() % 2**64 if len(ids) == 1 else ids.view(np.uint64).max(initial=0)
        if largest >= self._num_rows:
            wrong = ids[(ids < 0) | (ids >= self._num_rows)][0]
            raise TokenError(f"token id {wrong} is out of range; expected 0 to {self._num_rows - 1}")
        return ids


def _source(
    table: Table, spec: WeightSpec, packed: str | Path | None, reads: str, num_threads: int
) -> tuple[RowFormat, RowReader, bool]:
    """The format rows are kept in, who reads them, and whether what is read must still be brought to that format."""
    rows_format: RowFormat
    checkpoint, name = table.checkpoint, table.name
    if packed is not None:
        checkpoint, rows_format = open_packed(packed, table)
        if spec not in (BF16, rows_format.spec):
            raise SpecError(f"{packed}: packed as {rows_format.spec}, but {spec} is asked for")
        (name,) = checkpoint.names
    elif spec == BF16 and table.location.dtype is torch.bfloat16:
        rows_format = PlainRows(table.location.dtype, table.cols)
    else:
        rows_format = PackedRows.of(spec, table.cols)
    reader: RowReader
    if reads == "mapped":
        reader = MappedRows(checkpoint, name)
    else:
        reader = PositionedRows(checkpoint.location(name), num_threads)
    return rows_format, reader, packed is None and isinstance(rows_format, PackedRows)


def _capacity(rows: int | None, nbytes: int | None, row_nbytes: int) -> int:
    if (rows is None) == (nbytes is None):
        raise SpecError("a PLE cache takes its capacity in rows or in bytes: expected one of the two")
    if nbytes is None:
        assert rows is not None
        return rows
    if nbytes < row_nbytes:
        raise SpecError(f"a PLE cache of {nbytes} bytes: a row alone takes {row_nbytes}")
    return nbytes // row_nbytes


def _distinct(ids: Ids) -> Ids:
    """Each id once, in the order of first occurrence."""
    return ids[np.sort(np.unique(ids, return_index=True)[1])]
