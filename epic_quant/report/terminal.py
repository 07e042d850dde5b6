"""A table for a terminal, no wider than it."""

from __future__ import annotations

from epic_quant.report.blocks import Table

WIDTH = 100
_GAP = "  "
_LEAST = 8


def render(table: Table, width: int = WIDTH) -> str:
    """The table as lines of at most `width` characters; where it is wider, the widest of its text columns are cut."""
    cells = [[text.replace("`", "") for text in row] for row in (table.columns, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > width:
        widest = max(range(table.num_text_columns), key=widths.__getitem__)
        if widths[widest] <= _LEAST:
            break
        widths[widest] -= 1
    cells.insert(1, ["-" * most for most in widths])
    return "\n".join(
        _GAP.join(
            _cut(text, most).ljust(most) if index < table.num_text_columns else text.rjust(most)
            for index, (text, most) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
