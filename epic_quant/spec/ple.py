"""`PLESpec`: how much of the PLE table stays in RAM."""

from __future__ import annotations

from dataclasses import dataclass

from epic_quant.errors import SpecError, unknown

# A residency and what it keeps: `all` is the whole table, the others a number of rows.
RESIDENCIES = ("all", "static", "lru", "static+lru", "w-lrfu")


@dataclass(frozen=True)
class PLESpec:
    """Which rows of the table are resident: `all`, or N rows chosen in one of these ways.

    `static:N` keeps given rows, `lru:N` those used last, `static+lru:N` half of each kind, and `w-lrfu:N` a fifth used
    last and for the rest those used most often. Raises SpecError on an unknown residency or a capacity that is no
    positive number.
    """

    residency: str = "all"
    capacity_rows: int | None = None

    def __post_init__(self) -> None:
        if self.residency not in RESIDENCIES:
            raise SpecError(unknown("PLE residency", self.residency, RESIDENCIES))
        if (self.capacity_rows is None) != (self.residency == "all"):
            raise SpecError(f"ple={self}: 'all' takes no number of rows, and every other residency needs one")
        if self.capacity_rows is not None and self.capacity_rows <= 0:
            raise SpecError(f"ple={self}: the number of rows must be positive")

    @classmethod
    def parse(cls, text: str) -> PLESpec:
        """Read `all`, `static:5000` or `lru:5000`; `str` is the inverse. Raises SpecError on any other text."""
        residency, colon, rows = text.partition(":")
        if colon and not (rows.isascii() and rows.isdigit() and len(rows) < 16):
            raise SpecError(f"ple={text}: {rows!r} is not a number of rows")
        return cls(residency, int(rows) if colon else None)

    def __str__(self) -> str:
        return self.residency if self.capacity_rows is None else f"{self.residency}:{self.capacity_rows}"

    def resident_rows(self, table_rows: int) -> int:
        """Rows of a table of `table_rows` that are in RAM once the cache is full."""
        return table_rows if self.capacity_rows is None else min(self.capacity_rows, table_rows)
