"""Spearman's rank correlation, in pure Python."""

from __future__ import annotations

import math
from collections.abc import Sequence


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's correlation of the ranks, equal values sharing their mean rank; None where it is not defined.

    That is where there are fewer than three pairs, or where one side has one value only.
    """
    if len(pairs) < 3:
        return None
    first, second = (_centred_ranks(side) for side in zip(*pairs, strict=True))
    norm = math.sqrt(sum(rank * rank for rank in first) * sum(rank * rank for rank in second))
    return sum(a * b for a, b in zip(first, second, strict=True)) / norm if norm else None


def _centred_ranks(values: Sequence[float]) -> list[float]:
    """How many values are smaller less how many are larger: twice the distance of the rank from the mean rank."""
    return [float(sum((other < value) - (other > value) for other in values)) for value in values]
