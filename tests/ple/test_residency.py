"""What is hot after a stream of lookups, against plain implementations of the same rules."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.errors import SpecError
from epic_quant.ple import simulation
from epic_quant.ple.residency import HALF_LIFE_CAPACITIES, NAMES, WINDOW_SHARE, Residency

from .conftest import lru_hits

ROWS = 12
streams = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=80)
capacities = st.integers(1, ROWS)


def plain_w_lrfu(stream, window_rows, main_rows, half_life):
    """With every past lookup's weight summed anew each time."""
    times, window, main, hits = {}, [], [], []

    def value(row):
        return sum(2.0 ** ((time - now) / half_life) for time in times[row])

    for now, row in enumerate(stream):
        times.setdefault(row, []).append(now)
        hits.append(row in window or row in main)
        if not hits[-1]:
            window.append(row)
        if len(window) > window_rows:
            oldest = min(window, key=lambda other: times[other][-1])
            window.remove(oldest)
            main.append(oldest)
        if len(main) > main_rows:
            # The newcomer stands last, and gives way to its equals.
            main.remove(min(reversed(main), key=value))
    return hits


def fewest_misses(stream, capacity):
    """By trying everything: the fewest misses over all choices, whatever is hot at the beginning."""
    ids = sorted(set(stream))
    states = {frozenset(chosen): 0 for chosen in itertools.combinations(ids, min(capacity, len(ids)))}
    for row in stream:
        following = {}
        for hot, misses in states.items():
            if row in hot:
                options = [(hot, misses)]
            else:
                options = [(hot, misses + 1)] + [(hot - {old} | {row}, misses + 1) for old in hot]
            for key, count in options:
                following[key] = min(count, following.get(key, math.inf))
        states = following
    return min(states.values())


@given(streams, capacities)
def test_lru_is_the_textbooks(stream, capacity):
    residency = Residency.named("lru", ROWS, capacity)
    assert [residency.look_up(np.array([row])).hits for row in stream] == lru_hits(stream, capacity)


@given(streams, capacities)
def test_the_stack_distances_give_lrus_hits_at_every_capacity(stream, capacity):
    hits = lru_hits(stream, capacity)
    warm = len(stream) // 3
    assert simulation.lru(np.array(stream), [capacity], warm) == [sum(hits[warm:])]


@given(streams, st.integers(1, 4), st.integers(1, 8))
def test_w_lrfu_is_a_window_before_the_rows_of_largest_key(stream, window_rows, main_rows):
    half_life = 7  # 2^(1/7) is irrational, so that no two sums are equal but for rounding
    residency = Residency(ROWS, np.arange(0), window_rows, main_rows, half_life)
    hits = [residency.look_up(np.array([row])).hits for row in stream]
    assert hits == plain_w_lrfu(stream, window_rows, main_rows, half_life)


@given(streams)
def test_keys_that_are_scaled_down_keep_their_order(stream):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("epic_quant.ple.residency._EPOCH_HALF_LIVES", 2)
        whole, single = (Residency(ROWS, np.arange(0), 2, 4, 7) for _ in range(2))
        assert whole.look_up(np.array(stream)).hits == sum(plain_w_lrfu(stream, 2, 4, 7))
        assert sum(single.look_up(np.array([row])).hits for row in stream) == sum(plain_w_lrfu(stream, 2, 4, 7))


def test_rows_seen_once_do_not_drive_out_one_seen_often():
    scan = np.concatenate([[0, 0, 0], np.arange(1, 50), [0]])
    assert Residency.named("w-lrfu", 50, 5).look_up(scan).hits == 3
    assert Residency.named("lru", 50, 5).look_up(scan).hits == 2


@pytest.mark.parametrize("name", NAMES)
@given(streams, capacities, st.data())
def test_it_does_not_matter_how_a_stream_is_cut(name, stream, capacity, data):
    whole, cut = Residency.named(name, ROWS, capacity), Residency.named(name, ROWS, capacity)
    expected = whole.look_up(np.array(stream))
    hits = evictions = 0
    rest = stream
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        ids, rest = np.array(rest[:size]), rest[size:]
        if (cut.slot_of[ids] >= 0).all():
            cut.touch(ids)
            hits += len(ids)
        else:
            outcome = cut.look_up(ids)
            hits, evictions = hits + outcome.hits, evictions + outcome.evictions
    assert (hits, evictions) == (expected.hits, expected.evictions)
    assert np.array_equal(cut.slot_of, whole.slot_of)


@pytest.mark.parametrize("name", NAMES)
@given(streams, capacities)
def test_every_hot_row_has_a_slot_of_its_own(name, stream, capacity):
    residency = Residency.named(name, ROWS, capacity)
    placed = residency.look_up(np.array(stream)).placed
    slots = residency.slot_of[residency.slot_of >= 0]
    assert sorted(slots) == list(range(residency.num_rows))
    assert residency.num_rows <= capacity
    assert all(residency.slot_of[row] == slot for row, slot in placed.items())


@given(streams, st.lists(st.integers(0, ROWS - 1), min_size=2, unique=True))
def test_pinned_rows_never_leave(stream, pinned):
    residency = Residency.named("static+lru", ROWS, len(pinned), np.array(pinned))
    before = residency.slot_of[pinned[: len(pinned) // 2]].copy()
    residency.look_up(np.array(stream))
    assert np.array_equal(residency.slot_of[pinned[: len(pinned) // 2]], before)


@given(streams, capacities)
def test_static_and_lru_hits_are_found_from_stack_distances_too(stream, capacity):
    trace, pinned, warm = np.array(stream), np.arange(capacity)[: capacity // 2], len(stream) // 3
    expected = simulation.hits(Residency.named("static+lru", ROWS, capacity), trace, warm)
    assert simulation.static_lru(trace, pinned, capacity, warm) == expected


def test_static_keeps_the_lowest_ids_unless_others_are_given():
    assert np.flatnonzero(Residency.named("static", ROWS, 3).slot_of >= 0).tolist() == [0, 1, 2]
    given_ids = Residency.named("static", ROWS, 3, np.array([9, 1, 4, 2]))
    assert np.flatnonzero(given_ids.slot_of >= 0).tolist() == [1, 4, 9]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 5))
def test_the_optimum_is_what_trying_everything_finds(stream, capacity):
    assert simulation.optimum(np.array(stream), capacity) == len(stream) - fewest_misses(stream, capacity)


@pytest.mark.parametrize("name", NAMES)
@given(streams, capacities)
def test_no_residency_beats_the_optimum(name, stream, capacity):
    warm = len(stream) // 2
    hits = simulation.hits(Residency.named(name, ROWS, capacity), np.array(stream), warm)
    assert hits <= simulation.optimum(np.array(stream[warm:]), capacity)


@given(streams, capacities)
def test_the_most_frequent_rows_are_the_best_static_ones(stream, capacity):
    trace = np.array(stream)
    counts = sorted((stream.count(row) for row in range(ROWS)), reverse=True)
    assert simulation.static(trace, simulation.by_frequency(trace)[:capacity]) == sum(counts[:capacity])


def test_ids_by_frequency_are_the_seen_ones_the_lower_of_equals_first():
    assert simulation.by_frequency(np.array([7, 2, 9, 9, 2, 5])).tolist() == [2, 9, 5, 7]


@given(streams, st.sampled_from([0.01, 0.5, 0.9, 0.95, 0.99, 1.0]))
def test_fewer_static_rows_than_the_fewest_do_not_reach_the_rate(stream, rate):
    trace = np.array(stream)
    rows = simulation.fewest_static(trace, rate)
    hits = [simulation.static(trace, simulation.by_frequency(trace)[:count]) for count in (rows - 1, rows)]
    assert hits[0] < rate * len(stream) <= hits[1]


def test_a_long_trace_is_simulated_exactly():
    trace = np.random.default_rng(0).zipf(1.2, 20_000) % 3000
    residency = Residency.named("lru", 3000, 250)
    assert simulation.lru(trace, [250], 5000) == [simulation.hits(residency, trace, 5000)]


@pytest.mark.parametrize("capacity", [0, -1, ROWS + 1])
def test_a_capacity_that_is_not_within_the_table_is_refused(capacity):
    with pytest.raises(SpecError, match=f"of {capacity} rows: expected 1 to {ROWS}"):
        Residency.named("lru", ROWS, capacity)


def test_an_unknown_residency_is_refused_with_the_near_ones():
    with pytest.raises(SpecError, match="'lrv'; did you mean lru"):
        Residency.named("lrv", ROWS, 1)


@given(streams, capacities, st.permutations(range(ROWS)))
def test_an_lru_that_starts_from_a_list_has_looked_it_up_from_its_end(stream, capacity, ids):
    residency = Residency.named("lru", ROWS, capacity, np.array(ids))
    assert set(np.flatnonzero(residency.slot_of >= 0)) == set(ids[:capacity])
    expected = lru_hits([*ids[:capacity][::-1], *stream], capacity)[capacity:]
    assert [residency.look_up(np.array([row])).hits for row in stream] == expected


@given(streams, st.integers(5, ROWS), st.permutations(range(ROWS)))
def test_a_w_lrfu_that_starts_from_a_list_has_looked_it_up_from_its_end(stream, capacity, ids):
    window_rows, half_life = capacity // WINDOW_SHARE, HALF_LIFE_CAPACITIES * capacity
    expected = plain_w_lrfu([*ids[:capacity][::-1], *stream], window_rows, capacity - window_rows, half_life)
    residency = Residency.named("w-lrfu", ROWS, capacity, np.array(ids))
    assert residency.look_up(np.array(stream)).hits == sum(expected[capacity:])


@given(streams, st.integers(2, ROWS), st.permutations(range(ROWS)))
def test_of_a_list_static_and_lru_pins_the_first_half_and_starts_the_lru_with_the_rest(stream, capacity, ids):
    pinned, others = ids[: capacity // 2], ids[capacity // 2 : capacity]
    lru = iter(lru_hits([*others[::-1], *(row for row in stream if row not in pinned)], len(others))[len(others) :])
    expected = [row in pinned or next(lru) for row in stream]
    residency = Residency.named("static+lru", ROWS, capacity, np.array(ids))
    assert residency.look_up(np.array(stream)).hits == sum(expected)
