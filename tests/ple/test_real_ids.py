"""The PLE benchmark, run as a user runs it, on the token ids of real texts, against plain Python and NumPy."""

import json
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest

from epic_quant.ple import frequent_ids, simulation
from epic_quant.ple.residency import HALF_LIFE_CAPACITIES, WINDOW_SHARE, Residency
from epic_quant.records import JSON_KEY, Record
from epic_quant.records.subjects import (
    EMPTY_START,
    LOWEST_IDS,
    OPTIMUM,
    OTHER_TEXT,
    SHIPPED_LIST,
    PLEHitsRecord,
    PLEStartRecord,
    PLETextRecord,
)
from epic_quant.results.run import Run

from .conftest import lru_hits

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = {"kjv": "King James Bible, first 200,000 tokens", "python": "Python's library, first 200,000 tokens"}
OWN = [5, 6, 5, 5, 7, 5, 6, 5]


@pytest.fixture(scope="module")
def ids():
    """The ids of each text, as NumPy reads them."""
    path = REPOSITORY / "benchmarks" / "facts" / "traces" / "gemma3-tokens.npz"
    with np.load(path) as stored:
        return {name: stored[name].tolist() for name in TEXTS}


@pytest.fixture(scope="module")
def run(tmp_path_factory, run_pytest):
    """A run on one of the texts, and on a trace that a user gives."""
    folder = tmp_path_factory.mktemp("run")
    np.save(folder / "own.npy", np.array(OWN))
    options = [
        "-k",
        "King or own or test_text",
        "--ple-trace",
        folder / "own.npy",
        "--benchmark-json",
        folder / "o.json",
    ]
    status, printed = run_pytest("benchmarks/test_ple.py", *options)
    assert status == 0, printed
    benchmarks = json.loads((folder / "o.json").read_text(encoding="utf-8"))["benchmarks"]
    return Run({}, tuple(Record.from_json(one["extra_info"][JSON_KEY]) for one in benchmarks))


def by_count(stream):
    return sorted(set(stream), key=lambda row, counts=Counter(stream): (-counts[row], row))


def test_the_ids_that_a_text_uses_are_counted(run, ids):
    for name, text in TEXTS.items():
        found = run.one(PLETextRecord, text=text)
        assert found.tokens == 200_000
        assert found.hit_rate == np.count_nonzero(np.array(ids[name]) < 5000) / 200_000
        covered = np.cumsum([count for _, count in Counter(ids[name]).most_common()]) / 200_000
        assert found.rows == {f"{rate:.0%}": np.count_nonzero(covered < rate) + 1 for rate in (0.90, 0.95, 0.99)}


def test_hit_rates_are_those_of_the_second_half_alone(run, ids):
    warm, judged = np.split(np.array(ids["kjv"]), 2)
    records = {one.residency: one for one in run.of(PLEHitsRecord, trace=TEXTS["kjv"])}
    for place, rows in enumerate(records["lru"].capacities):
        rates = {name: one.hit_rates[place] for name, one in records.items()}
        assert rates["lru"] == sum(lru_hits(ids["kjv"], rows)[100_000:]) / 100_000
        assert rates[LOWEST_IDS] == np.mean(judged < rows)
        assert rates["static, most frequent"] == np.mean(np.isin(judged, by_count(warm.tolist())[:rows]))
        assert max(rates.values()) == rates[OPTIMUM]
    assert {one.distinct for one in records.values()} == {len(np.unique(judged))}
    assert {one.met_before for one in records.values()} == {sum(lru_hits(ids["kjv"], 10**9)[100_000:]) / 100_000}


def test_w_lrfu_on_real_ids_is_that_of_its_definition(ids):
    """With the weight of every lookup kept up to date by multiplication; only a part, since this takes long."""
    stream, capacity = ids["python"][90_000:96_000], 100
    window_rows, decay = capacity // WINDOW_SHARE, 0.5 ** (1 / (HALF_LIFE_CAPACITIES * capacity))
    value, at, window, main, hits = {}, {}, OrderedDict(), set(), 0

    def worth(row, now):
        return value[row] * decay ** (now - at[row])

    for now, row in enumerate(stream):
        value[row], at[row] = (worth(row, now) if row in value else 0) + 1, now
        hits += row in window or row in main
        if row not in main:
            window[row] = None
            window.move_to_end(row)
        if len(window) > window_rows:
            oldest, _ = window.popitem(last=False)
            main.add(oldest)
            if len(main) > capacity - window_rows:
                # The one that came from the window gives way to its equals.
                main.remove(min(main, key=lambda other: (worth(other, now), other != oldest)))
    residency = Residency.named("w-lrfu", 262_144, capacity)
    assert simulation.hits(residency, np.array(stream)) == hits


def test_the_shipped_list_is_made_from_the_first_halves_alone(ids):
    assert frequent_ids().tolist() == by_count(ids["kjv"][:100_000] + ids["python"][:100_000])


def test_what_a_start_from_a_list_saves_is_counted_in_the_second_half(run, ids):
    judged = ids["kjv"][100_000:]
    places = np.linspace(0, 99_000, 10, dtype=int)
    lists = {
        EMPTY_START: [],
        SHIPPED_LIST: by_count(ids["kjv"][:100_000] + ids["python"][:100_000]),
        OTHER_TEXT: by_count(ids["python"][:100_000]),
    }
    for start, first in lists.items():
        found = run.one(PLEStartRecord, trace=TEXTS["kjv"], residency="lru", start=start)
        assert (found.tokens, found.places, found.list_rows) == (1000, 10, len(first))
        for rows, misses, rate in zip(found.capacities, found.misses, found.hit_rates, strict=True):
            assert rate == sum(lru_hits(judged, rows, first)) / 100_000
            counted = [1000 - sum(lru_hits(judged[place : place + 1000], rows, first)) for place in places]
            assert misses == np.mean(counted)
        assert found.hit_rate == found.hit_rates[found.capacities.index(5000)]


def test_a_static_start_misses_what_is_not_among_the_first_of_the_list(run, ids):
    found = run.one(PLEStartRecord, trace=TEXTS["kjv"], residency="static", start=OTHER_TEXT)
    first = by_count(ids["python"][:100_000])
    assert found.hit_rates == tuple(np.mean(np.isin(ids["kjv"][100_000:], first[:rows])) for rows in found.capacities)


def test_a_users_own_trace_is_measured_too(run):
    lru = run.one(PLEHitsRecord, trace="own.npy", residency="lru")
    assert (lru.tokens, lru.distinct, set(lru.hit_rates)) == (4, 3, {0.75})
    # Its ids are of the small model's vocabulary, and the real ones of Gemma's.
    assert run.of(PLEStartRecord, trace="own.npy") == run.of(PLETextRecord, text="own.npy") == []
