"""What nothing as small is as good as."""

from __future__ import annotations

from collections.abc import Iterable

Sized = tuple[str, float, float]


def front(points: Iterable[Sized]) -> list[Sized]:
    """Of (name, bytes, error), by rising bytes, those that nothing of as few bytes equals or beats in error."""
    found: list[Sized] = []
    for nbytes, error, name in sorted((x, y, name) for name, x, y in points):
        if not found or error < found[-1][2]:
            found.append((name, nbytes, error))
    return found
