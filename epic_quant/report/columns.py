"""Tables declared as columns over rows of one type."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Generic, TypeVar

from epic_quant.report.blocks import Table

Row = TypeVar("Row")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A title, what the column shows of a row, and how that is written; text is aligned left, numbers right."""

    title: str
    value: Callable[[Row], Any]
    format: Callable[[Any], str] = str
    text: bool = False


def table(columns: Iterable[Column[Row]], rows: Iterable[Row], caption: str = "") -> Table:
    """The table; its text columns are the first ones and perhaps the last."""
    columns = tuple(columns)
    leading = len(list(takewhile(lambda column: column.text, columns)))
    return Table(
        tuple(column.title for column in columns),
        tuple(tuple(column.format(column.value(row)) for column in columns) for row in rows),
        max(1, leading),
        caption,
        has_remark=columns[-1].text and leading < len(columns),
    )
