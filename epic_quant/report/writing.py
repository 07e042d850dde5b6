"""A report in its formats, into a folder or as text; every file whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from epic_quant.errors import ReportError
from epic_quant.files import atomic
from epic_quant.report import html, long_csv, markdown
from epic_quant.report.blocks import Block, Figure
from epic_quant.results.run import Run

# The main file of each format. What is drawn lies beside the Markdown, and inside the page.
FILE_NAMES: Mapping[str, str] = {"md": "COMPARISON.md", "html": "index.html", "csv": "records.csv"}
DEFAULT_FORMATS = ("md", "html")

_TEXTS: Mapping[str, Callable[[Run, Sequence[Block]], str]] = {
    "md": lambda run, blocks: markdown.render(blocks),
    "html": lambda run, blocks: html.render(blocks),
    "csv": lambda run, blocks: long_csv.render(run),
}


def text(run: Run, blocks: Sequence[Block], format_name: str) -> str:
    """The report in one format, to be printed: Markdown then has no plots, since these are files beside it."""
    shown = [block for block in blocks if not isinstance(block, Figure)] if format_name == "md" else blocks
    return _TEXTS[format_name](run, shown)


def write_report(
    run: Run, blocks: Sequence[Block], folder: Path, formats: Sequence[str] = DEFAULT_FORMATS
) -> list[Path]:
    """Write the report's files into a folder, made where it is not there, and return the main one of each format.

    Raises ReportError where the folder cannot be written; nothing is left half-written then.
    """
    # Renamed from the last to the first, so that a text never points to a plot that is not there.
    files = {FILE_NAMES[name]: _TEXTS[name](run, blocks) for name in formats}
    files |= {block.file_name: block.svg for block in blocks if isinstance(block, Figure)} if "md" in formats else {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as renamed_at_the_end:
            for name, content in files.items():
                unfinished = renamed_at_the_end.enter_context(atomic(folder / name))
                unfinished.write_text(content, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ReportError(f"{folder}: cannot be written: {error.strerror}") from error
    return [folder / FILE_NAMES[name] for name in formats]
