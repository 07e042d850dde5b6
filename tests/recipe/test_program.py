import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from epic_quant.recipe import program
from epic_quant.recipe.program import MAX_GAP, Option, assign, least_cost

# Losses over many decades, as divergences are, and costs from bytes to gigabytes.
losses = st.floats(1e-9, 10) | st.just(0.0)
costs = st.integers(0, 20) | st.integers(10**8, 10**9)
problems = st.lists(st.lists(st.builds(Option, costs, losses), min_size=1, max_size=5), min_size=1, max_size=5)


def budget_at(units, part):
    least, most = least_cost(units), sum(max(option.cost for option in options) for options in units)
    return least + int(part * (most - least))


def sums(units, chosen):
    taken = [options[index] for options, index in zip(units, chosen, strict=True)]
    return sum(option.cost for option in taken), sum(option.loss for option in taken)


def brute_force(units, budget):
    fitting = (chosen for chosen in itertools.product(*units) if sum(option.cost for option in chosen) <= budget)
    return min(sum(option.loss for option in chosen) for chosen in fitting)


@settings(max_examples=100)
@given(problems, st.floats(0, 1))
def test_no_assignment_within_the_budget_loses_less(units, part):
    budget = budget_at(units, part)
    chosen, gap = assign(units, budget)
    cost, loss = sums(units, chosen)
    assert cost <= budget
    assert 0 <= gap <= MAX_GAP
    largest = max(option.loss for options in units for option in options)
    assert (1 - gap) * loss <= brute_force(units, budget) + 1e-12 * largest


@settings(max_examples=100)
@given(problems, st.floats(0, 1), st.lists(st.integers(1, 4), min_size=1, max_size=2))
def test_the_gap_holds_where_few_partial_assignments_are_kept(units, part, kept):
    budget = budget_at(units, part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "_KEPT", kept)
        chosen, gap = assign(units, budget)
    cost, loss = sums(units, chosen)
    assert cost <= budget
    assert 0 <= gap <= 1
    largest = max(option.loss for options in units for option in options)
    assert (1 - gap) * loss <= brute_force(units, budget) + 1e-12 * largest


def plausible(seed, num_units=301, widths=15):
    """Units of E4B's sizes and specs of 1.6 to 8.5 bits with bf16, whose losses fall by some 6 dB a bit."""
    rng = np.random.default_rng(seed)
    units = []
    for numel in rng.choice([26_214_400, 5_242_880, 2_621_440, 1_310_720], num_units).tolist():
        bits = np.linspace(1.6, 8.5, widths) + 0.1 * rng.normal(size=widths)
        falling = numel * 1e-10 * np.exp(rng.normal()) * 4**-bits * np.exp(0.3 * rng.normal(size=widths))
        specs = [Option(int(numel * width / 8), loss) for width, loss in zip(bits, falling.tolist(), strict=True)]
        units.append([Option(2 * numel, 0.0), *specs])
    return units


@pytest.mark.parametrize("part", [0.02, 0.1, 0.2, 0.4, 0.7])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_model_of_e4bs_size_is_solved_to_the_gap(seed, part):
    """Judged by the linear relaxation, whose least loss no assignment is below: the two differ by one unit's part."""
    units = plausible(seed)
    budget = budget_at(units, part)
    chosen, gap = assign(units, budget)
    cost, loss = sums(units, chosen)
    assert cost <= budget
    assert gap <= MAX_GAP
    bound = solved_by_scipy(units, budget, integral=False)
    assert bound * (1 - 1e-7) <= loss <= bound * 1.0005


@pytest.mark.parametrize("part", [0.1, 0.3])
def test_scipys_integer_program_finds_no_less(part):
    units = plausible(2, num_units=12, widths=6)
    budget = budget_at(units, part)
    _, loss = sums(units, assign(units, budget).chosen)
    assert loss == pytest.approx(solved_by_scipy(units, budget, integral=True), rel=2e-6)


def solved_by_scipy(units, budget, *, integral):
    unit = np.repeat(np.arange(len(units)), [len(options) for options in units])
    costs, losses = (np.array(values, dtype=float) for values in zip(*itertools.chain(*units), strict=True))
    one_each = LinearConstraint((unit == np.arange(len(units))[:, None]).astype(float), 1, 1)
    within = LinearConstraint(costs / budget, -np.inf, 1)
    # The solver stops at an absolute gap of 1e-6 too.
    scale = 1e4 / losses.max()
    options = {"mip_rel_gap": 1e-7}
    solved = milp(
        losses * scale, integrality=[int(integral)] * len(unit), constraints=[one_each, within], options=options
    )
    assert solved.success
    return solved.fun / scale


def test_a_gap_that_is_not_reached_is_said():
    """Options all on one line have bounds that are all alike, so that nothing is proved but by a budget that is met."""
    rng = np.random.default_rng(0)
    units = []
    for _ in range(20):
        costs = np.cumsum(rng.integers(1, 10**7, 15))
        units.append([Option(int(cost), float(costs[-1] - cost) * 1e-8) for cost in costs])
    budget = budget_at(units, 0.5)
    chosen, gap = assign(units, budget)
    cost, loss = sums(units, chosen)
    # On one line the loss is given by the cost.
    least = loss - (budget - cost) * 1e-8
    assert cost <= budget
    assert MAX_GAP < gap < 0.01
    assert loss * (1 - gap) == pytest.approx(least, rel=1e-9)


def test_the_smallest_budget_leaves_the_cheapest_options():
    units = [[Option(3, 0.0), Option(1, 5.0)], [Option(2, 1.0), Option(7, 0.5)]]
    assert least_cost(units) == 3
    assert assign(units, 3) == ([1, 0], 0)
    with pytest.raises(ValueError, match="below 3"):
        assign(units, 2)


def test_a_large_budget_leaves_what_loses_least():
    assert assign([[Option(3, 0.0), Option(1, 5.0)], [Option(2, 1.0), Option(7, 0.5)]], 10**12) == ([0, 1], 0)


def test_of_equal_losses_the_smaller_cost_is_taken():
    assert assign([[Option(9, 0.25), Option(4, 0.25), Option(6, 0.25)]], 100) == ([1], 0)


def test_one_byte_too_many_is_too_many():
    units = [[Option(10**9 + 1, 0.0), Option(10**9, 1.0)], [Option(10**9, 0.0), Option(1, 3.0)]]
    assert assign(units, 2 * 10**9) == ([1, 0], 0)
    assert assign(units, 2 * 10**9 + 1) == ([0, 0], 0)
