"""Hits of a residency over a trace of token ids, and the most that any residency can have.

A trace is ids [n], the first `warm_tokens` of which only fill the cache: nothing is counted there.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from epic_quant.ple.residency import Ids, Residency


def hits(residency: Residency, trace: Ids, warm_tokens: int = 0) -> int:
    """Hits of any residency, looked up token by token as the cache does; the residency is used up."""
    residency.look_up(trace[:warm_tokens])
    return residency.look_up(trace[warm_tokens:]).hits


def lru(trace: Ids, capacities: Sequence[int], warm_tokens: int = 0) -> list[int]:
    """LRU's hits at each capacity, all from one pass: an LRU of C rows hits where the stack distance is below C."""
    distances = np.sort(stack_distances(trace)[warm_tokens:])
    return [int(count) for count in np.searchsorted(distances, capacities)]


def static_lru(trace: Ids, pinned: Ids, capacity: int, warm_tokens: int = 0) -> int:
    """Hits where `pinned` rows are hot and the rest of the capacity is an LRU of all others."""
    is_pinned = np.isin(trace, pinned)
    measured_pinned = int(np.count_nonzero(is_pinned[warm_tokens:]))
    others_warm = warm_tokens - int(np.count_nonzero(is_pinned[:warm_tokens]))
    return measured_pinned + lru(trace[~is_pinned], [capacity - len(pinned)], others_warm)[0]


def stack_distances(trace: Ids) -> Ids:
    """How many other ids were looked up since the last lookup of the same one; the largest int64 where there is none.

    With p the place of that last lookup, an id between p and i is new there where its own last lookup is before p. All
    of the p + 1 lookups up to p have theirs before p too, so they are counted along and taken off again. O(n log n).
    Mattson et al., "Evaluation techniques for storage hierarchies" (1970).
    """
    last = last_use(trace)
    distances = _smaller_before(last + 1) - (last + 1)
    distances[last < 0] = np.iinfo(np.int64).max
    return distances


def last_use(trace: Ids) -> Ids:
    """The place of the lookup of the same id before each one; -1 where there is none."""
    order = np.argsort(trace, kind="stable")
    again = trace[order[1:]] == trace[order[:-1]]
    last = np.full(len(trace), -1, dtype=np.int64)
    last[order[1:][again]] = order[:-1][again]
    return last


def _smaller_before(values: Ids) -> Ids:
    """For each of n values from 0 to n how many before it are smaller.

    One bit at a time from the highest: among values that agree in all higher bits, those with a 0 are smaller than
    those with a 1.
    """
    counts = np.zeros(len(values), dtype=np.int64)
    order = np.arange(len(values))  # sorted by the higher bits, otherwise as they came
    for bit in reversed(range(len(values).bit_length())):
        ordered = values[order]
        is_one = (ordered >> bit & 1).astype(bool)
        zeros_before = np.cumsum(~is_one) - ~is_one
        prefix = ordered >> (bit + 1)
        starts = np.flatnonzero(np.diff(prefix, prepend=-1))
        zeros_before -= np.repeat(zeros_before[starts], np.diff(starts, append=len(values)))
        counts[order[is_one]] += zeros_before[is_one]
        order = order[np.argsort(ordered >> bit, kind="stable")]
    return counts


def static(trace: Ids, resident: Ids) -> int:
    """Hits where `resident` rows are hot and stay so."""
    return int(np.count_nonzero(np.isin(trace, resident)))


def by_frequency(trace: Ids) -> Ids:
    """The distinct ids of a trace, most frequent first and the lower of equals."""
    ids, counts = np.unique(trace, return_counts=True)
    return ids[np.argsort(-counts, kind="stable")]


def fewest_static(trace: Ids, hit_rate: float) -> int:
    """The fewest rows that answer this share of a trace's lookups, chosen once and knowing the whole trace."""
    counts = np.sort(np.unique(trace, return_counts=True)[1])[::-1]
    return int(np.searchsorted(np.cumsum(counts), hit_rate * len(trace))) + 1


def optimum(trace: Ids, capacity: int) -> int:
    """The most hits that any `capacity` rows can have, whatever is hot at the beginning.

    Belady's rule: the row whose next lookup is farthest off gives way, which may be the new one. The rows looked up
    first are hot at the beginning, since that is what the rule keeps of a prefix that holds every row.
    """
    num = len(trace)
    next_use = np.full(num, num, dtype=np.int64)
    last = last_use(trace)
    next_use[last[last >= 0]] = np.flatnonzero(last >= 0)
    first = np.flatnonzero(last < 0)[:capacity]

    # A hot row is known by the place of its next lookup. Places that are past stay in the heap, far from its head.
    awaited = np.zeros(num + 1, dtype=bool)
    awaited[first] = True
    is_awaited: list[bool] = awaited.tolist()
    heap = [-place for place in reversed(first.tolist())]
    num_hot = len(heap)
    found = 0
    for place, following in enumerate(next_use.tolist()):
        if is_awaited[place]:
            found += 1
            num_hot -= 1
        if following == num:
            continue
        if num_hot == capacity:
            if -heap[0] < following:
                continue
            is_awaited[-heapq.heapreplace(heap, -following)] = False
        else:
            heapq.heappush(heap, -following)
            num_hot += 1
        is_awaited[following] = True
    return found
