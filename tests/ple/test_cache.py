"""Rows out of the cache are the table's bits, whatever is hot, in whatever batches, from however many threads."""

import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, ConfigError, SpecError, TokenError
from epic_quant.ple import PLERowCache, reading, simulation
from epic_quant.ple.residency import NAMES, Residency
from epic_quant.spec import WeightSpec

from .conftest import DIM, LAYERS, NAME, ROWS, write_table

ROW_NBYTES = 2 * LAYERS * DIM
batches = st.lists(st.lists(st.integers(0, ROWS - 1), max_size=40), max_size=12)


def bits(rows):
    return rows.reshape(len(rows), LAYERS * DIM).view(torch.int16)


@pytest.mark.parametrize("reads", ["positioned", "mapped"])
@pytest.mark.parametrize("residency", NAMES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(batches=batches, capacity=st.integers(1, 30))
def test_rows_are_the_tables_bits(checkpoint, table, residency, reads, batches, capacity):
    with PLERowCache(checkpoint, capacity_rows=capacity, residency=residency, reads=reads) as cache:
        for batch in batches:
            ids = torch.tensor(batch, dtype=torch.int64)
            rows = cache.rows(ids)
            assert rows.shape == (len(batch), LAYERS, DIM)
            assert torch.equal(bits(rows), table[ids].view(torch.int16))


@pytest.mark.parametrize("residency", NAMES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(batches=batches, capacity=st.integers(1, 30))
def test_the_simulation_counts_the_caches_hits(checkpoint, residency, batches, capacity):
    with PLERowCache(checkpoint, capacity_rows=capacity, residency=residency) as cache:
        for batch in batches:
            cache.rows(torch.tensor(batch, dtype=torch.int64))
        trace = np.array([row for batch in batches for row in batch], dtype=np.int64)
        assert cache.stats.hits == simulation.hits(Residency.named(residency, ROWS, capacity), trace)
        assert cache.stats.hits + cache.stats.misses == len(trace)
        if residency == "lru":
            assert [cache.stats.hits] == simulation.lru(trace, [capacity])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_table_of_another_dtype_is_held_in_bf16(weights, tmp_path, dtype):
    """The rounded weights, in two bytes each; what is added rounds away."""
    rounded = weights.bfloat16()
    ids = torch.tensor([5, 1, 5, 0])
    with (
        Checkpoint.open(write_table(tmp_path, rounded.to(dtype) * (1 + 2**-10))) as other,
        PLERowCache(other, capacity_nbytes=3 * ROW_NBYTES) as cache,
    ):
        assert cache.capacity_rows == 3
        for _ in range(2):
            assert torch.equal(cache.rows(ids).reshape(4, -1), rounded[ids].float())


def test_a_table_of_codes_is_refused(weights, tmp_path):
    with (
        Checkpoint.open(write_table(tmp_path, weights.char())) as other,
        pytest.raises(CheckpointError, match="is stored as int8; expected plain"),
    ):
        PLERowCache(other, capacity_rows=3)


def test_a_batch_larger_than_the_cache_is_answered_whole(checkpoint, table):
    ids = torch.arange(ROWS).flip(0)
    with PLERowCache(checkpoint, capacity_rows=3) as cache:
        assert torch.equal(bits(cache.rows(ids)), table[ids].view(torch.int16))
        assert cache.stats.evictions == ROWS - 3
        assert cache.stats.resident_nbytes == 3 * ROW_NBYTES
        assert cache.rows(torch.tensor([0, 1, 2])).shape[0] == 3
        assert cache.stats.hits == 3


def test_stats_count_lookups_of_tokens_and_bytes_of_distinct_rows(checkpoint):
    with PLERowCache(checkpoint, capacity_rows=10) as cache:
        assert np.isnan(cache.stats.hit_rate)
        cache.rows(torch.tensor([5, 5, 7, 5]))
        assert (cache.stats.hits, cache.stats.misses, cache.stats.evictions) == (2, 2, 0)
        assert cache.stats.bytes_read == 2 * ROW_NBYTES
        assert cache.stats.resident_nbytes == 2 * ROW_NBYTES
        cache.rows(torch.tensor([7, 5]))
        assert cache.stats.hit_rate == 4 / 6
        assert cache.stats.bytes_read == 2 * ROW_NBYTES


def test_static_rows_are_hot_from_the_start_and_alone(checkpoint):
    with PLERowCache(checkpoint, capacity_rows=2, residency="static", initial_ids=torch.tensor([9, 9, 4, 1])) as cache:
        assert cache.stats.bytes_read == 2 * ROW_NBYTES
        cache.rows(torch.tensor([9, 4, 1, 1]))
        assert (cache.stats.hits, cache.stats.misses) == (2, 2)


@pytest.mark.parametrize("residency", ["lru", "static+lru", "w-lrfu"])
def test_initial_rows_are_hot_from_the_start_and_are_the_files(checkpoint, table, residency):
    ids = torch.tensor([150, 3, 77, 9])
    with PLERowCache(checkpoint, capacity_rows=4, residency=residency, initial_ids=ids) as cache:
        assert (cache.stats.bytes_read, cache.stats.resident_nbytes) == (4 * ROW_NBYTES, 4 * ROW_NBYTES)
        assert torch.equal(cache.rows(ids).view(4, -1).view(torch.int16), table[ids].view(torch.int16))
        assert (cache.stats.hits, cache.stats.misses) == (4, 0)
        cache.rows(torch.tensor([200]))
        assert cache.stats.evictions == 1


def test_a_capacity_in_bytes_is_as_many_rows_as_fit(checkpoint):
    with PLERowCache(checkpoint, capacity_nbytes=3 * ROW_NBYTES + 1) as cache:
        assert cache.capacity_rows == 3


@pytest.mark.parametrize("ids", [torch.tensor([[1, 2], [3, 4]]), torch.tensor([1, 2, 3, 4], dtype=torch.int16)])
def test_ids_of_any_shape_and_integer_dtype_are_taken(checkpoint, table, ids):
    with PLERowCache(checkpoint, capacity_rows=2) as cache:
        assert torch.equal(bits(cache.rows(ids)), table[1:5].view(torch.int16))


def test_a_result_is_a_copy(checkpoint, table):
    with PLERowCache(checkpoint, capacity_rows=2) as cache:
        for _ in range(3):
            cache.rows(torch.tensor([1])).zero_()
        assert torch.equal(bits(cache.rows(torch.tensor([1]))), table[1:2].view(torch.int16))


@pytest.mark.parametrize("residency", NAMES)
def test_threads_that_hammer_it_get_the_tables_bits(checkpoint, table, residency):
    expected = table.view(torch.int16)
    wrong, looked_up = [], 50 * 8 * 4

    def hammer(seed):
        random = np.random.default_rng(seed)
        for _ in range(50):
            ids = torch.from_numpy(random.integers(0, random.choice([12, ROWS]), 8))
            if not torch.equal(bits(cache.rows(ids)), expected[ids]):
                wrong.append(ids)

    with PLERowCache(checkpoint, capacity_rows=10, residency=residency, num_threads=4) as cache:
        threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert cache.stats.hits + cache.stats.misses == looked_up
        assert cache._residency.num_rows <= 10


@pytest.mark.parametrize("reads", ["positioned", "mapped"])
def test_a_file_that_shrinks_is_an_error_and_no_crash(tmp_path, table, reads):
    path = write_table(tmp_path, table) / "model.safetensors"
    with Checkpoint.open(path) as opened, PLERowCache(opened, capacity_rows=2, reads=reads) as cache:
        cache.rows(torch.tensor([0]))
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CheckpointError, match="became shorter"):
            cache.rows(torch.tensor([ROWS - 1, 1, 5]))
        assert cache.rows(torch.tensor([0])).shape[0] == 1, "what is hot is still there"


@pytest.mark.parametrize("missing", [["preadv"], ["preadv", "pread"], ["preadv", "pread", "posix_fadvise"]])
def test_systems_without_a_call_read_the_same(checkpoint, table, missing, monkeypatch):
    for name in missing:
        monkeypatch.delattr(os, name, raising=False)
    ids = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    with PLERowCache(checkpoint, capacity_rows=2) as cache:
        assert torch.equal(bits(cache.rows(ids)), table[ids].view(torch.int16))


def test_adjacent_rows_are_one_read(checkpoint, monkeypatch):
    asked = []
    read_at = reading.PositionedRows._read_at
    monkeypatch.setattr(
        reading.PositionedRows, "_read_at", lambda self, part, at: asked.append(part.nbytes) or read_at(self, part, at)
    )
    with PLERowCache(checkpoint, capacity_rows=2) as cache:
        cache.rows(torch.tensor([12, 10, 90, 11, 10]))
    assert sorted(asked) == [ROW_NBYTES, 3 * ROW_NBYTES]


def test_a_read_that_the_system_cuts_short_is_continued(checkpoint, table, monkeypatch):
    read_at = reading.PositionedRows._read_at
    monkeypatch.setattr(reading.PositionedRows, "_read_at", lambda self, part, at: read_at(self, part[:7], at))
    with PLERowCache(checkpoint, capacity_rows=2) as cache:
        assert torch.equal(bits(cache.rows(torch.tensor([3, 4]))), table[3:5].view(torch.int16))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, ROWS]), f"token id {ROWS} is out of range; expected 0 to {ROWS - 1}"),
        (torch.tensor([-1]), "token id -1 is out of range"),
        (torch.tensor([1.0]), "float32; expected integers"),
        (torch.tensor([True]), "bool; expected integers"),
    ],
)
def test_ids_that_are_no_integers_in_range_are_refused(checkpoint, ids, message):
    with PLERowCache(checkpoint, capacity_rows=2) as cache, pytest.raises(TokenError, match=message):
        cache.rows(ids)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"capacity_rows": 0}, f"0 rows: expected 1 to {ROWS}"),
        ({"capacity_rows": ROWS + 1}, f"{ROWS + 1} rows: expected 1 to {ROWS}"),
        ({"capacity_nbytes": ROW_NBYTES - 1}, f"a row alone takes {ROW_NBYTES}"),
        ({"capacity_nbytes": 0}, "0 bytes: a row"),
        ({}, "in rows or in bytes"),
        ({"capacity_rows": 1, "capacity_nbytes": 1000}, "in rows or in bytes"),
        ({"capacity_rows": 1, "reads": "positionned"}, "did you mean positioned"),
        ({"capacity_rows": 1, "spec": WeightSpec("int4", gptq=True)}, "leave out"),
    ],
)
def test_settings_that_do_not_fit_are_refused(checkpoint, settings_, message):
    with pytest.raises(SpecError, match=message):
        PLERowCache(checkpoint, **settings_)


def test_a_table_of_another_width_is_refused(tmp_path, table):
    write_table(tmp_path, table, dim=DIM // 2)
    with Checkpoint.open(tmp_path) as opened, pytest.raises(ConfigError, match=r"6 layers of 4 .* make it \[203, 24\]"):
        PLERowCache(opened, capacity_rows=1)


def test_a_file_without_a_table_is_refused(tmp_path, table):
    write_table(tmp_path, table)
    save_file({"other": table}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as opened, pytest.raises(CheckpointError, match=f"0 tensors named {NAME[21:]}"):
        PLERowCache(opened, capacity_rows=1)


def test_a_model_without_ple_is_refused(tmp_path, table):
    write_table(tmp_path, table, dim=0)
    with Checkpoint.open(tmp_path) as opened, pytest.raises(ConfigError, match="no per-layer embeddings"):
        PLERowCache(opened, capacity_rows=1)
