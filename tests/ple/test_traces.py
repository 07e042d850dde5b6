"""Traces have the distribution that they are named for."""

import numpy as np
import pytest

from epic_quant.errors import TokenError
from epic_quant.ple import traces

ROWS = 262144


def test_the_originals_trace_is_85_percent_in_the_lowest_5000_ids():
    trace = traces.original(100_000, ROWS, seed=0)
    assert abs(np.mean(trace < 5000) - 0.850) < 0.003
    for low, high in ((0, 5000), (5000, ROWS)):
        inside = trace[(trace >= low) & (trace < high)]
        assert abs((inside.mean() - low) / (high - low) - 0.5) < 0.01, "uniform"


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.2])
def test_a_zipf_trace_has_its_exponent_over_shuffled_ids(exponent):
    trace = traces.zipf(exponent, 200_000, 1000, seed=1)
    counts = np.sort(np.bincount(trace, minlength=1000))[::-1]
    weights = np.arange(1, 1001) ** -exponent
    expected = weights / weights.sum() * len(trace)
    assert np.allclose(counts[:20], expected[:20], rtol=0.06)
    top = np.argsort(-np.bincount(trace))[:100]
    assert 350 < top.mean() < 650, "the frequent ids lie all over the table"


def test_ids_are_read_from_a_npy_file(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([[1, 2], [3, 1]], dtype=np.uint16))
    loaded = traces.load_ids(tmp_path / "ids.npy", 4)
    assert loaded.dtype == np.int64
    assert loaded.tolist() == [1, 2, 3, 1]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([], dtype=np.int64), "a trace of 0 tokens"),
        (np.array([1.0, 2.0]), "expected an array of integers, found float64"),
        (np.array([1, 4]), "token id 4 is out of range"),
        (np.array([1, -1]), "token id -1 is out of range"),
    ],
)
def test_ids_that_make_no_trace_are_refused(tmp_path, ids, message):
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(TokenError, match=message):
        traces.load_ids(tmp_path / "ids.npy", 4)


@pytest.mark.parametrize("content", [b"", b"not an array"])
def test_a_file_that_is_no_array_is_refused(tmp_path, content):
    (tmp_path / "ids.npy").write_bytes(content)
    with pytest.raises(TokenError, match=r"cannot be read as a \.npy array"):
        traces.load_ids(tmp_path / "ids.npy", 4)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TokenError, match="cannot be read"):
        traces.load_ids(tmp_path / "none.npy", 4)
