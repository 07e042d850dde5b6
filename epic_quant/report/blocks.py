"""The blocks of a report, independent of its format.

Texts are plain, but for `code` between backticks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Heading:
    """A title: level 1 is the report's, 2 a section's."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list without order."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """Conclusions, each computed from the records of the run."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `num_text_columns` are aligned left, the others, numbers, right, but for a last remark.

    The caption says what is in it where the heading above does not.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text_columns: int = 1
    caption: str = ""
    has_remark: bool = False

    def is_text(self, column: int) -> bool:
        """Whether the column, counted from 0, holds text and not numbers."""
        return column < self.num_text_columns or (self.has_remark and column == len(self.columns) - 1)


@dataclass(frozen=True)
class Figure:
    """A plot: the name of its file, what it shows in words, and the SVG itself."""

    file_name: str
    alt: str
    svg: str


@dataclass(frozen=True)
class Slider:
    """Rows of which the page shows one at a time, chosen by a slider; elsewhere, and in print, there are `few` of them.

    The table's first column is what the slider goes over, rising, the second what is looked for there, and the others
    are drawn as bars on one scale from zero. `texts` has for each row a long text to be copied, `copied` says of what.
    """

    label: str
    table: Table
    texts: tuple[str, ...]
    copied: str
    most: int = 10

    @property
    def few(self) -> Table:
        """At most `most` rows, the first and the last among them, at equal distances."""
        last = len(self.table.rows) - 1
        chosen = dict.fromkeys(round(last * i / (self.most - 1)) for i in range(self.most)) if last > 0 else (0,)
        return replace(self.table, rows=tuple(self.table.rows[index] for index in chosen))


Block = Heading | Paragraph | Bullets | Findings | Table | Figure | Slider


def code(text: str) -> str:
    """Text from outside (a name, a path) as one code span, whatever it holds."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
