"""Which rows are hot: the bookkeeping of a row cache, without the rows.

Slots are of three kinds. Pinned rows never leave theirs. A new row enters the window, where the row looked up longest
ago gives way (LRU). What leaves the window may enter the main part, where the row with the least key gives way, whether
that is the newcomer or one that was there. The key is LRFU's (Lee et al., "LRFU: A Spectrum of Policies that Subsumes
the Least Recently Used and Least Frequently Used Policies", 2001): the number of lookups, each of which counts half
after `half_life` more. So rows are ranked as in W-TinyLFU (Einziger et al., 2017), but by exact counts in place of a
sketch: a vocabulary is small enough to keep the key of every row, hot or not.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epic_quant.errors import SpecError, unknown

Ids = NDArray[np.int64]

NAMES = ("static", "lru", "static+lru", "w-lrfu")

# The best mean hit rate that `benchmarks/search_ple.py` finds, on traces that no benchmark reports: large windows
# suit bursty text, small ones Zipf.
WINDOW_SHARE = 5
HALF_LIFE_CAPACITIES = 8

# A lookup counts 2^(time / half_life), so that older ones count less without being touched; after so many half-lives
# all keys are scaled down, which a power of two does without rounding.
_EPOCH_HALF_LIVES = 256


@dataclass(frozen=True)
class Outcome:
    """The result of looking up ids: `placed` has the slot of every row that came in and is still there."""

    hits: int
    evictions: int
    placed: dict[int, int]


class Residency:
    """Slots from 0 on for some of `table_rows` rows: `pinned` ones, a window, and a main part with its `half_life`."""

    def __init__(
        self, table_rows: int, pinned: Ids, window_rows: int = 0, main_rows: int = 0, half_life: int = 1
    ) -> None:
        self.slot_of = np.full(table_rows, -1, dtype=np.int32)  # -1 is not hot
        self.slot_of[pinned] = np.arange(len(pinned))
        self.num_rows = len(pinned)  # that are hot
        self._window_rows, self._main_rows, self._half_life = window_rows, main_rows, half_life
        self._clock = 0
        self._time = np.full(table_rows, -1, dtype=np.int64)
        self._key = np.zeros(table_rows)
        # The rows of each part, with a time or key that they had at some time, so at most what they have now.
        self._window: list[tuple[int, int]] = []
        self._main: list[tuple[float, int]] = []

    @classmethod
    def named(cls, name: str, table_rows: int, capacity: int, initial_ids: Ids | None = None) -> Residency:
        """The residency of that name over `capacity` rows.

        The first of `initial_ids`, distinct ids in the order of their worth, are hot at the start. `static` pins all of
        them, `static+lru` the first half, in both the lowest ids unless given; rows that are not pinned are as if they
        had just been looked up once each, the first of them last. Raises SpecError on an unknown name, and on a
        capacity that is not from 1 to `table_rows`.
        """
        if name not in NAMES:
            raise SpecError(unknown("PLE residency", name, NAMES))
        if not 1 <= capacity <= table_rows:
            raise SpecError(f"a PLE cache of {capacity} rows: expected 1 to {table_rows}, the rows of the table")
        num_pinned = {"static": capacity, "static+lru": capacity // 2}.get(name, 0)
        ids = np.arange(num_pinned) if initial_ids is None else initial_ids[:capacity]
        pinned, others = ids[:num_pinned], ids[num_pinned:]
        if name == "static":
            return cls(table_rows, pinned)
        if name == "w-lrfu":
            window_rows = max(1, capacity // WINDOW_SHARE)
            residency = cls(table_rows, pinned, window_rows, capacity - window_rows, HALF_LIFE_CAPACITIES * capacity)
        else:
            residency = cls(table_rows, pinned, capacity - len(pinned))
        residency.look_up(others[::-1])
        return residency

    def touch(self, ids: Ids) -> None:
        """Count lookups of rows that are all hot: ids [n], in the order of the text."""
        if not self._window_rows:
            return
        if not self._main_rows:
            self._time[ids] = self._clock if len(ids) == 1 else np.arange(self._clock, self._clock + len(ids))
            self._clock += len(ids)
            return
        for part, times, weights in self._spans(ids):
            self._time[part] = times
            np.add.at(self._key, part, weights)

    def look_up(self, ids: Ids) -> Outcome:
        """Look up ids [n], hot or not, one after another; so it does not matter how a text is cut into batches."""
        if not self._window_rows:
            return Outcome(int(np.count_nonzero(self.slot_of[ids] >= 0)), 0, {})
        hits = evictions = 0
        placed: dict[int, int] = {}
        # Views give and take plain numbers, several times faster than arrays do.
        time_of, key_of, slot_of = self._time.data, self._key.data, self.slot_of.data
        for part, times, weights in self._spans(ids):
            for row, time, weight in zip(part.tolist(), times.tolist(), weights, strict=True):
                time_of[row] = time
                key_of[row] += weight
                if slot_of[row] >= 0:
                    hits += 1
                    continue
                leaver = self._enter(row, time)
                if leaver is None:
                    slot = self.num_rows
                    self.num_rows += 1
                else:
                    slot = slot_of[leaver]
                    slot_of[leaver] = -1
                    placed.pop(leaver, None)
                    evictions += 1
                slot_of[row] = slot
                placed[row] = slot
        return Outcome(hits, evictions, placed)

    def _spans(self, ids: Ids) -> Iterator[tuple[Ids, Ids, list[float]]]:
        """The ids, cut at the ends of epochs, with the time and the weight of each lookup; the clock goes on."""
        epoch = _EPOCH_HALF_LIVES * self._half_life
        while len(ids):
            since = self._clock % epoch
            if self._main_rows and self._clock and not since:
                scale = 2.0**-_EPOCH_HALF_LIVES
                self._key *= scale
                self._main = [(key * scale, row) for key, row in self._main]
            part = ids[: epoch - since] if self._main_rows else ids
            times = np.arange(self._clock, self._clock + len(part))
            # One by one: NumPy rounds otherwise in long arrays than in short ones.
            ages = range(since, since + len(part)) if self._main_rows else ()
            weights = [math.exp2(age / self._half_life) for age in ages] or [0.0] * len(part)
            yield part, times, weights
            self._clock += len(part)
            ids = ids[len(part) :]

    def _enter(self, row: int, time: int) -> int | None:
        """Let a row in; the row that must go for it, or None where there is room."""
        if len(self._window) < self._window_rows:
            heapq.heappush(self._window, (time, row))
            return None
        oldest = _least(self._window, self._time)
        heapq.heapreplace(self._window, (time, row))
        if not self._main_rows:
            return oldest
        key = float(self._key[oldest])
        if len(self._main) < self._main_rows:
            heapq.heappush(self._main, (key, oldest))
            return None
        coldest = _least(self._main, self._key)
        if key <= self._key[coldest]:
            return oldest
        heapq.heapreplace(self._main, (key, oldest))
        return coldest


def _least(heap: list[tuple[Any, int]], now: NDArray[Any]) -> int:
    """The row with the least value, left at the head of a heap that is brought up to date as far as need be."""
    while True:
        value, row = heap[0]
        if (latest := now[row]) == value:
            return row
        heapq.heapreplace(heap, (latest.item(), row))
