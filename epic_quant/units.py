"""Sizes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]{1,2})? *(?:([kmgt])(i?))?b?", re.IGNORECASE)


def parse_nbytes(text: str) -> int:
    """Bytes of `3.5GB`, `800 MiB`, `6g` or `1.5e9`; a unit is a power of 1000, with an i of 1024.

    Raises ValueError where the text is no size.
    """
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no number of bytes, such as 3.5GB, 800MiB or 1000000")
    mantissa, exponent, unit, binary = found.groups(default="")
    power = " kmgt".index(unit.lower() or " ")
    return int(Fraction(mantissa + exponent) * (1024 if binary else 1000) ** power)
