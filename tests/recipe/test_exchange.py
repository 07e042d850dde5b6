import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_quant.recipe.exchange import Shares, improved, mean_square
from epic_quant.recipe.program import Option, assign, least_cost

TOKENS = 400


def problem(seed, num_units=6, num_options=4, common=1.0):
    """Units of random bytes whose derivatives have something in common, and the assignment of least own prices."""
    rng = np.random.default_rng(seed)
    shared = common * rng.normal(size=TOKENS)
    units = []
    for _ in range(num_units):
        costs = np.sort(rng.integers(1, 100, num_options))[::-1].copy()
        signs = rng.choice([-1, 1], num_options)[:, None]
        scales = np.sort(rng.exponential(size=num_options))[:, None]
        units.append(Shares(costs, ((rng.normal(size=(num_options, TOKENS)) + signs * shared) * scales).astype("f4")))
    return units


def own_prices(units):
    return [
        [Option(int(cost), mean_square([unit], [index])) for index, cost in enumerate(unit.costs)] for unit in units
    ]


def cost_of(units, chosen):
    return sum(int(unit.costs[option]) for unit, option in zip(units, chosen, strict=True))


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_exchanges_stay_within_the_budget_and_never_raise_the_divergence(seed, part):
    units = problem(seed)
    least, most = least_cost(own_prices(units)), sum(int(unit.costs.max()) for unit in units)
    budget = least + int(part * (most - least))
    chosen = assign(own_prices(units), budget).chosen
    better = improved(units, chosen, budget)
    assert cost_of(units, better) <= budget
    assert mean_square(units, better) <= mean_square(units, chosen) * (1 + 1e-6)


def test_the_mean_square_is_that_of_the_summed_derivatives():
    units = problem(1)
    total = sum(unit.derivatives[1].astype(np.float64) for unit in units)
    assert mean_square(units, [1] * len(units)) == pytest.approx(0.5 * np.mean(total**2))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cost", [10, 12], ids=["at equal bytes", "for bytes saved elsewhere"])
def test_a_planted_pair_of_cancelling_errors_is_found(seed, cost):
    """Two tensors whose errors cancel, though each alone is better off with other options."""
    rng = np.random.default_rng(seed)
    error = rng.normal(size=TOKENS)
    noise = 0.01 * rng.normal(size=TOKENS)
    first = Shares(np.array([10]), np.stack([error]).astype("f4"))
    second = Shares(np.array([10, cost]), np.stack([0.7 * rng.normal(size=TOKENS), noise - error]).astype("f4"))
    spare = Shares(np.array([5, 2]), np.outer([0.1, 0.11], rng.normal(size=TOKENS)).astype("f4"))
    units = [first, second, spare]
    budget = 25
    chosen = assign(own_prices(units), budget).chosen
    assert chosen[:2] == [0, 0]
    better = improved(units, chosen, budget)
    assert better[:2] == [0, 1]
    assert cost_of(units, better) <= budget
    assert mean_square(units, better) < 0.05 * mean_square(units, chosen)


@pytest.mark.parametrize("seed", range(10))
def test_independent_errors_of_the_same_size_are_noise_and_stay_as_they_are(seed):
    """Of 40 times 10 options that are all alike, many seem better on these tokens than the one that was chosen."""
    rng = np.random.default_rng(seed)
    units = [Shares(np.full(10, 3), rng.normal(size=(10, TOKENS)).astype("f4")) for _ in range(40)]
    assert improved(units, [0] * 40, 120) == [0] * 40


def test_nothing_to_choose_for_is_no_error():
    assert improved([], [], 0) == []
    assert mean_square([], []) == 0
