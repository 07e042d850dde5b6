"""Blocks to GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tabulate import tabulate

from epic_quant.report.blocks import Block, Bullets, Figure, Findings, Heading, Paragraph, Slider, Table


def render(blocks: Iterable[Block]) -> str:
    """The whole document; figures are links to files beside it."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_escape(text)}"
        case Paragraph(text):
            return _escape(text)
        case Bullets(items) | Findings(items):
            return "\n".join(f"- {_escape(item)}" for item in items)
        case Table():
            return _table(block)
        case Slider():
            return _table(block.few)
        case Figure(file_name, alt, _):
            return f"![{_escape(alt)}]({file_name})"


def _table(table: Table) -> str:
    return tabulate(
        [[_cell(text) for text in row] for row in table.rows],
        headers=[_cell(text) for text in table.columns],
        tablefmt="pipe",
        colalign=["left" if table.is_text(i) else "right" for i in range(len(table.columns))],
        disable_numparse=True,
    )


def _cell(text: str) -> str:
    # GitHub splits cells at a bar even inside a code span.
    return _escape(text).replace("|", r"\|")


def _escape(text: str) -> str:
    """Text with what Markdown would read as markup made harmless, but for code spans."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([\\*<\[\]])", r"\\\1", part) for part in parts)
