"""Exchanges: improve an assignment by what the errors of its tensors do together.

With s the derivatives of the chosen options, one a token, an assignment's predicted divergence is ½ mean (Σ s)²: the
sum of the options' own prices, and cross terms between them. Those are means over a sample of tokens, and of the
thousands of exchanges that are looked at some seem better by chance alone; one is made only where it wins more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Derivatives = NDArray[np.float32]

# Standard errors that an exchange must win by: of some ten thousand, chance makes about one seem 4 better.
SIGNIFICANCE = 4.0

# Options that are tried in pairs, of those that save bytes and of those that spend them;
# and exchanges that are looked at closely.
_PAIRED, _MAX_EXAMINED = 64, 40
_MAX_EXCHANGES = 400


class Shares(NamedTuple):
    """One unit's options: bytes [options], and derivatives [options, tokens]."""

    costs: NDArray[np.int64]
    derivatives: Derivatives


def mean_square(units: Sequence[Shares], chosen: Sequence[int]) -> float:
    """½ mean (Σ s)² of an assignment over the tokens: cross terms between units included."""
    total = sum(unit.derivatives[option].astype(np.float64) for unit, option in zip(units, chosen, strict=True))
    return float(0.5 * np.mean(np.square(total)))


def improved(units: Sequence[Shares], chosen: Sequence[int], budget: int) -> list[int]:
    """The assignment after every exchange of one or two options that lowers its divergence beyond doubt, within budget.

    `chosen` are the indices of each unit's option, whose bytes together are at most `budget`.
    """
    chosen = list(chosen)
    if not units:
        return chosen
    owner = np.repeat(np.arange(len(units)), [len(unit.costs) for unit in units])
    option = np.concatenate([np.arange(len(unit.costs)) for unit in units])
    costs = np.concatenate([unit.costs for unit in units])
    derivatives = np.concatenate([unit.derivatives for unit in units])  # [all options, tokens]
    first = np.flatnonzero(option == 0)
    for _ in range(_MAX_EXCHANGES):
        rows = first + np.array(chosen)
        total = derivatives[rows].sum(axis=0)
        steps = derivatives - derivatives[rows][owner]  # what each option would add to the total
        spent = costs - costs[rows][owner]
        exchange = _best(steps, spent, owner, total, budget - int(costs[rows].sum()))
        if not exchange:
            break
        for one in exchange:
            chosen[owner[one]] = int(option[one])
    return chosen


def _best(
    steps: Derivatives, spent: NDArray[np.int64], owner: NDArray[np.int64], total: Derivatives, spare: int
) -> tuple[int, ...]:
    """The option, or the two that save and spend bytes, which lower ½ mean (Σ s)² most, and surely; () if none does."""
    num_tokens = len(total)
    change = (steps @ total + 0.5 * np.einsum("ot,ot->o", steps, steps)) / num_tokens
    alone = np.flatnonzero((spent <= spare) & (change < 0))
    alone = alone[np.argsort(change[alone])[:_MAX_EXAMINED]]
    saving, spending = np.flatnonzero(spent < 0), np.flatnonzero((spent > 0) & (change < 0))
    # The ones that lose least for a byte saved, and that win most for a byte spent.
    saving = saving[np.argsort(change[saving] / -spent[saving])[:_PAIRED]]
    spending = spending[np.argsort(change[spending] / spent[spending])[:_PAIRED]]
    both = change[saving][:, None] + change[spending][None] + steps[saving] @ steps[spending].T / num_tokens
    fits = (spent[saving][:, None] + spent[spending][None] <= spare) & (owner[saving][:, None] != owner[spending][None])
    pairs = np.argwhere(fits & (both < 0))
    pairs = pairs[np.argsort(both[tuple(pairs.T)])[:_MAX_EXAMINED]]
    exchanges: list[tuple[float, tuple[int, ...]]] = [(float(change[one]), (int(one),)) for one in alone]
    exchanges += [
        (float(both[save, spend]), (int(saving[save]), int(spending[spend]))) for save, spend in pairs.tolist()
    ]
    for _, exchange in sorted(exchanges):
        step = steps[list(exchange)].sum(axis=0)
        won = step * total + 0.5 * np.square(step)  # of each token
        if won.mean() < -SIGNIFICANCE * won.std() / np.sqrt(num_tokens):
            return exchange
    return ()
