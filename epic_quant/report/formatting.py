"""Numbers to text. A missing value is always —, and a nonzero number never reads as zero."""

from __future__ import annotations

import math
from collections.abc import Callable

from epic_quant.records import Metric

MISSING = "—"


def significant(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, without an exponent between 0.0001 and the largest numbers."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    # The exponent after rounding: 0.9996 is 1.00, not 1.000.
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if exponent < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def megabytes(nbytes: float | None) -> str:
    """Bytes in MB of 1e6 bytes to one decimal, or to two digits where one decimal would say little."""
    if nbytes is None or not math.isfinite(nbytes) or 0 < abs(nbytes) < 1e6:
        return significant(None if nbytes is None else nbytes / 1e6, 2)
    return f"{nbytes / 1e6:,.1f}"


def scaled(factor: float, digits: int = 3) -> Callable[[float | None], str]:
    """What writes a value times a factor, such as seconds as µs."""
    return lambda value: significant(None if value is None else value * factor, digits)


milliseconds = scaled(1e3)


def with_error(value: float | None, error: float | None, digits: int = 3) -> str:
    """A value and its standard error, where that is known."""
    if value is None or error is None:
        return significant(value, digits)
    return f"{significant(value, digits)} ± {significant(error, 2)}"


def with_unit(metric: Metric, value: float | None, digits: int = 3) -> str:
    """A metric's value in the unit that people read: bytes in MB, seconds in ms."""
    scale, unit = {"B": (1e-6, "MB"), "s": (1e3, "ms")}.get(metric.unit, (1.0, metric.unit))
    number = significant(None if value is None else value * scale, digits)
    return number if number == MISSING or not unit else f"{number} {unit}"


def change(part: float | None) -> str:
    """A change as a part of what was before, such as +4.2%."""
    if part is None:
        return MISSING
    return f"{'-' if part < 0 else '+'}{significant(abs(100 * part), 2)}%"


def quotient(value: float | None, reference: float | None) -> float | None:
    """The value over the reference, or None where one of them is missing or the reference is zero."""
    return None if value is None or not reference else value / reference


def ratio(value: float | None) -> str:
    """How many times something a value is, such as 1.23×."""
    text = significant(value)
    return text if text == MISSING else f"{text}×"


def times(value: float | None, reference: float | None) -> str:
    """How many times the reference a value is."""
    return ratio(quotient(value, reference))


def percent(value: float | None, reference: float | None) -> str:
    """What part of the reference a value is, such as 45%."""
    part = quotient(value, reference)
    return MISSING if part is None else f"{significant(100 * part, 2)}%"
