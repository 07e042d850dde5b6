import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_quant.errors import RecipeError
from epic_quant.recipe.program import Option, assign, least_cost

# Losses over many decades, as divergences are, and costs from bytes to gigabytes.
losses = st.floats(1e-9, 10) | st.just(0.0)
costs = st.integers(0, 20) | st.integers(10**8, 10**9)
problems = st.lists(st.lists(st.builds(Option, costs, losses), min_size=1, max_size=5), min_size=1, max_size=4)


def brute_force(units, budget):
    fitting = (chosen for chosen in itertools.product(*units) if sum(option.cost for option in chosen) <= budget)
    return min(sum(option.loss for option in chosen) for chosen in fitting)


@settings(max_examples=60, deadline=None)
@given(problems, st.floats(0, 1))
def test_no_assignment_within_the_budget_loses_less(units, part):
    least, most = least_cost(units), sum(max(option.cost for option in options) for options in units)
    budget = least + int(part * (most - least))
    chosen = [options[index] for options, index in zip(units, assign(units, budget), strict=True)]
    assert sum(option.cost for option in chosen) <= budget
    largest = max(option.loss for options in units for option in options)
    assert sum(option.loss for option in chosen) == pytest.approx(
        brute_force(units, budget), rel=1e-9, abs=1e-9 * largest
    )


def test_the_smallest_budget_leaves_the_cheapest_options():
    units = [[Option(3, 0.0), Option(1, 5.0)], [Option(2, 1.0), Option(7, 0.5)]]
    assert least_cost(units) == 3
    assert assign(units, 3) == [1, 0]
    with pytest.raises(ValueError, match="below 3"):
        assign(units, 2)


def test_a_large_budget_leaves_what_loses_least():
    assert assign([[Option(3, 0.0), Option(1, 5.0)], [Option(2, 1.0), Option(7, 0.5)]], 10**12) == [0, 1]


def test_of_equal_losses_the_smaller_cost_is_taken():
    assert assign([[Option(9, 0.25), Option(4, 0.25), Option(6, 0.25)]], 100) == [1]


def test_one_byte_too_many_is_too_many():
    """The solver's tolerance is a thousandth of a thousandth, here a thousand bytes."""
    units = [[Option(10**9 + 1, 0.0), Option(10**9, 1.0)], [Option(10**9, 0.0), Option(1, 3.0)]]
    assert assign(units, 2 * 10**9) == [1, 0]
    assert assign(units, 2 * 10**9 + 1) == [0, 0]


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(RecipeError, match=r"epic-quant\[recipe\]"):
        assign([[Option(1, 1.0)]], 1)
