"""Layer numbers as a policy string has them: `0-5+8` is layers 0 to 5 and 8."""

from __future__ import annotations

import re
from collections.abc import Iterable

from epic_quant.errors import SpecError

_RANGE = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


def parse_layers(text: str) -> list[int]:
    """The numbers, in the order given. Raises SpecError on any other text, and on a range that runs backwards."""
    layers: list[int] = []
    for part in text.split("+"):
        found = _RANGE.fullmatch(part)
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise SpecError(f"{text!r} are no layers; expected numbers and ranges, such as 0-5+8")
        layers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return layers


def format_layers(layers: Iterable[int]) -> str:
    """The shortest text of these numbers, in ascending order: the inverse of `parse_layers`."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return "+".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
