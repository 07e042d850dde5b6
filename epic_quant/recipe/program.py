"""One option for each unit, the least loss within a budget of cost: an integer program, solved to a gap of 1e-6.

    minimise    sum over u, o of loss[u, o] x[u, o]
    subject to  sum over o of x[u, o] = 1 for every u,   sum over u, o of cost[u, o] x[u, o] <= budget,   x in {0, 1}

This is the multiple-choice knapsack problem (H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", chapter 11).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from epic_quant.errors import RecipeError

# How far, as a part of it, a solution may be above the least loss. Small programs are solved exactly.
MAX_GAP = 1e-6
_TIME_LIMIT_S = 30.0
# The solver stops at an absolute gap of 1e-6 too, so losses are scaled until that is nothing.
_LARGEST_LOSS = 1e4


class Option(NamedTuple):
    """What choosing it costs, and what is lost by it."""

    cost: int
    loss: float


def least_cost(units: Sequence[Sequence[Option]]) -> int:
    """The smallest budget that any assignment fits in."""
    return sum(min(option.cost for option in options) for options in units)


def assign(units: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """For each unit the index of its option in an assignment of least loss whose cost is at most `budget`.

    Raises RecipeError where scipy is missing, and ValueError where the budget is below `least_cost`.
    """
    if budget < least_cost(units):
        raise ValueError(f"budget {budget} is below {least_cost(units)}")
    kept = [_undominated(options) for options in units]
    excluded: list[list[int]] = []
    while True:
        chosen = _solve(units, kept, budget, excluded)
        if sum(options[index].cost for options, index in zip(units, chosen, strict=True)) <= budget:
            return chosen
        # The solver takes 0.999999 for 1, which can hide some bytes. Costs are integers, so this sum is right.
        excluded.append(chosen)


def _undominated(options: Sequence[Option]) -> list[int]:
    """The indices of options that no other equals or beats in both, by rising cost."""
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: options[index]):
        if not kept or options[index].loss < options[kept[-1]].loss:
            kept.append(index)
    return kept


def _solve(
    units: Sequence[Sequence[Option]], kept: Sequence[Sequence[int]], budget: int, excluded: Sequence[Sequence[int]]
) -> list[int]:
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise RecipeError("recipes need scipy: pip install 'epic-quant[recipe]'") from error

    variables = [(unit, index) for unit, indices in enumerate(kept) for index in indices]
    if not variables:
        return []
    losses = np.array([units[unit][index].loss for unit, index in variables])
    costs = np.array([units[unit][index].cost for unit, index in variables], dtype=float)
    of_unit = csr_array((np.ones(len(variables)), ([unit for unit, _ in variables], range(len(variables)))))
    constraints = [
        LinearConstraint(of_unit, 1, 1),
        LinearConstraint(costs / max(1, budget), -np.inf, budget / max(1, budget)),
    ]
    for chosen in excluded:
        same = np.array([chosen[unit] == index for unit, index in variables], dtype=float)
        constraints.append(LinearConstraint(same, -np.inf, len(kept) - 1))
    with _without_output():
        solved = milp(
            losses * (_LARGEST_LOSS / max(np.abs(losses).max(), 1e-300)),
            integrality=np.ones(len(variables)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": MAX_GAP, "time_limit": _TIME_LIMIT_S},
        )
    if solved.x is None:
        raise RecipeError(f"the solver gave up: {solved.message}")
    found = {unit: index for (unit, index), value in zip(variables, solved.x, strict=True) if value > 0.5}
    return [found[unit] for unit in range(len(kept))]


@contextmanager
def _without_output() -> Iterator[None]:
    """Keep standard output clean: HiGHS 1.12 prints a line there whatever its options (ERGO-Code/HiGHS, issue 2783)."""
    if os.name != "posix":
        yield
        return
    flush = ctypes.CDLL(None).fflush  # Of C, which buffers apart from Python.
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
