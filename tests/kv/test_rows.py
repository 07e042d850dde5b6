"""The queue under every store, against a plain list."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.kv.rows import Rows

steps = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=30)


@given(steps, st.none() | st.integers(0, 7))
def test_it_holds_what_a_list_holds(steps, most):
    """However many rows come and go at a time, growing without end or as a ring."""
    rows, expected, count = Rows((2,), torch.int32, most), [], 0
    for come, go in steps:
        new = torch.arange(count, count + come, dtype=torch.int32)
        rows.append(torch.stack([new, -new], dim=1))
        expected = (expected + new.tolist())[-most if most else 0 :] if most != 0 else []
        count += come
        go = min(go, len(expected))
        rows.drop(go)
        expected = expected[go:]
        assert len(rows) == len(expected)
        assert rows.rows().tolist() == [[row, -row] for row in expected]
        assert rows.nbytes == 8 * len(expected) <= rows.allocated_nbytes


def test_an_append_seldom_allocates():
    """Growth by half: a thousand single rows in some seventeen steps, with at most half as much to spare."""
    rows, sizes = Rows((4,), torch.uint8), set()
    for count in range(1, 1001):
        rows.append(torch.zeros(1, 4, dtype=torch.uint8))
        sizes.add(rows.allocated_nbytes)
        assert rows.allocated_nbytes <= 1.5 * 4 * max(count, 2)
    assert len(sizes) <= 20


def test_a_ring_allocates_no_more_than_it_holds():
    rows = Rows((4,), torch.uint8, most=10)
    for _ in range(100):
        rows.append(torch.zeros(3, 4, dtype=torch.uint8))
    assert rows.nbytes == rows.allocated_nbytes == 40
