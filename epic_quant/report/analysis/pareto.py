"""The Pareto front of error over bytes."""

from __future__ import annotations

from collections.abc import Iterable

Sized = tuple[str, float, float]


def front(points: Iterable[Sized]) -> list[Sized]:
    """Of (name, bytes, error), by rising bytes, those without an equal or smaller one of equal or less error."""
    found: list[Sized] = []
    for nbytes, error, name in sorted((x, y, name) for name, x, y in points):
        if not found or error < found[-1][2]:
            found.append((name, nbytes, error))
    return found
