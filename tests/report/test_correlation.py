import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from epic_quant.report.analysis.correlation import spearman

# Few distinct values, so that most lists have ties.
values = st.integers(-3, 3) | st.floats(-1e6, 1e6)


@settings(max_examples=60)
@given(st.lists(st.tuples(values, values), min_size=3, max_size=12))
def test_it_is_scipys(pairs):
    first, second = zip(*pairs, strict=True)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert spearman(pairs) is None
    else:
        assert spearman(pairs) == pytest.approx(spearmanr(first, second).statistic, abs=1e-9)


def test_any_rising_relation_is_one_and_any_falling_is_minus_one():
    assert spearman([(x, math.exp(x)) for x in range(5)]) == pytest.approx(1)
    assert spearman([(x, -(x**3)) for x in range(5)]) == pytest.approx(-1)


@pytest.mark.parametrize("pairs", [[], [(1, 2)], [(1, 2), (2, 3)]])
def test_two_points_say_nothing(pairs):
    assert spearman(pairs) is None
