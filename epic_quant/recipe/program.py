"""One option for each unit, the least loss within a budget of cost: the multiple-choice knapsack problem.

    minimise    sum over u of loss[u, o(u)]
    subject to  sum over u of cost[u, o(u)] <= budget,   one option o(u) for every unit u

Solved by dynamic programming over the units, with the Lagrangian's bound at the price of a byte that is best for it
(H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", chapter 11). A partial assignment is kept while no other
has at most its cost and its loss, and while its bound is below the best assignment known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# A gap that is small enough, and how many partial assignments are kept after each unit in one attempt after another.
# The least bound of those that are dropped is what the gap is counted from.
MAX_GAP = 1e-6
_KEPT = (100, 1000, 10_000)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Option(NamedTuple):
    """What choosing it costs, and what is lost by it; neither is negative."""

    cost: int
    loss: float


class Assignment(NamedTuple):
    """The index of each unit's option, and a proved gap: no assignment loses less than (1 - `gap`) times its loss."""

    chosen: list[int]
    gap: float


class _Unit(NamedTuple):
    """Options [n] of one unit, against the one that the Lagrangian takes: more cost, more loss, and more of the sum."""

    indices: Ints
    costs: Ints
    losses: Floats
    bounds: Floats  # loss + price · cost, 0 at least


def least_cost(units: Sequence[Sequence[Option]]) -> int:
    """The smallest budget that any assignment fits in."""
    return sum(min(option.cost for option in options) for options in units)


def assign(units: Sequence[Sequence[Option]], budget: int) -> Assignment:
    """An assignment of least loss whose cost is at most `budget`, to a gap of `MAX_GAP` or what is said with it.

    Raises ValueError where the budget is below `least_cost`.
    """
    if budget < least_cost(units):
        raise ValueError(f"budget {budget} is below {least_cost(units)}")
    kept = [_undominated(options) for options in units]
    relaxed, price = _relaxed(units, kept, budget)
    spare = budget - sum(options[index].cost for options, index in zip(units, relaxed, strict=True))
    relative = [_relative(*one, price) for one in zip(units, kept, relaxed, strict=True)]
    lower = sum(options[index].loss for options, index in zip(units, relaxed, strict=True)) - price * spare
    chosen, excess, proved = relaxed, price * spare, 0.0  # over the Lagrangian's bound: what is known, what is least
    for count in _KEPT:
        if excess - proved <= MAX_GAP * (lower + excess):
            break
        changed, reached, dropped = _search(relative, spare, price, excess, count)
        if reached < excess:
            excess, chosen = reached, [changed.get(unit, index) for unit, index in enumerate(relaxed)]
        proved = max(proved, min(dropped, excess))
    return Assignment(chosen, max(0.0, excess - proved) / (lower + excess) if lower + excess > 0 else 0.0)


def _undominated(options: Sequence[Option]) -> list[int]:
    """The indices of options that no other equals or beats in both, by rising cost."""
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: options[index]):
        if not kept or options[index].loss < options[kept[-1]].loss:
            kept.append(index)
    return kept


def _relaxed(units: Sequence[Sequence[Option]], kept: Sequence[Sequence[int]], budget: int) -> tuple[list[int], float]:
    """What minimises loss + price · cost within the budget, and that price of a byte: the least that keeps to it."""
    chosen = [indices[0] for indices in kept]
    steps = []
    for unit, (options, indices) in enumerate(zip(units, kept, strict=True)):
        at = 0
        while at < len(indices) - 1:  # along the lower convex hull
            here = options[indices[at]]
            price, at = max(
                ((here.loss - options[index].loss) / (options[index].cost - here.cost), place)
                for place, index in enumerate(indices[at + 1 :], at + 1)
            )
            steps.append((price, unit, indices[at]))
    spare = budget - least_cost(units)
    for price, unit, index in sorted(steps, key=lambda step: -step[0]):
        spare -= units[unit][index].cost - units[unit][chosen[unit]].cost
        if spare < 0:
            return chosen, price
        chosen[unit] = index
    return chosen, 0.0


def _relative(options: Sequence[Option], indices: Sequence[int], at: int, price: float) -> _Unit:
    costs = np.array([options[index].cost - options[at].cost for index in indices])
    losses = np.array([options[index].loss - options[at].loss for index in indices])
    return _Unit(np.array(indices), costs, losses, np.maximum(0.0, losses + price * costs))


def _search(
    units: Sequence[_Unit], spare: int, price: float, excess: float, count: int
) -> tuple[dict[int, int], float, float]:
    """Other options by unit, the excess that they reach, and the least that an assignment which was dropped can have.

    Of those dropped for their own sake: what cannot be better than `excess` is none of them.
    """
    open_units = [(unit, one) for unit, one in enumerate(units) if np.count_nonzero(one.bounds < excess) > 1]
    # The ones last that change at the least loss: before them few partial assignments are below the best known.
    open_units.sort(key=lambda pair: -np.partition(pair[1].bounds, 1)[1])
    least_left = np.cumsum([0, *(int(one.costs.min()) for _, one in reversed(open_units))])[::-1]
    costs, losses, least_dropped = np.zeros(1, dtype=np.int64), np.zeros(1), np.inf
    trail = []
    for (unit, one), least in zip(open_units, least_left[1:], strict=True):
        options = np.flatnonzero(one.bounds < excess)
        new_costs = (costs[:, None] + one.costs[options]).ravel()
        new_losses = (losses[:, None] + one.losses[options]).ravel()
        bounds = new_losses + price * new_costs
        kept = np.flatnonzero((bounds < excess) & (new_costs + least <= spare))
        if not len(kept):
            return {}, np.inf, least_dropped
        kept = kept[np.lexsort((new_losses[kept], new_costs[kept]))]
        best = np.minimum.accumulate(new_losses[kept])
        kept = kept[np.append(True, best[1:] < best[:-1])]
        if len(kept) > count:
            stays = _stays(new_costs[kept], bounds[kept], count)
            least_dropped = min(least_dropped, float(bounds[kept[~stays]].min()))
            kept = kept[stays]
        costs, losses = new_costs[kept], new_losses[kept]
        trail.append((unit, one.indices[options[kept % len(options)]], kept // len(options)))
    last = int(np.argmin(losses))
    reached = float(losses[last]) + price * spare
    changed = {}
    for unit, indices, parents in reversed(trail):
        changed[unit] = int(indices[last])
        last = int(parents[last])
    return changed, reached, least_dropped


def _stays(costs: Ints, bounds: Floats, count: int) -> NDArray[np.bool_]:
    """Which of more than `count`, by rising cost, stay: half for the least bounds, half for the least in their range.

    The ranges of costs are equal. Where all bounds are alike, they keep assignments of every cost.
    """
    order, half = np.argsort(bounds, kind="stable"), count // 2
    ranges = (costs[order] - costs[0]) * half // (costs[-1] - costs[0] + 1)
    stays = np.zeros(len(costs), dtype=np.bool_)
    stays[order[:half]] = True
    stays[order[np.unique(ranges, return_index=True)[1]]] = True
    return stays
