"""`python -m epic_quant.report out.json`: the report's command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from epic_quant import __version__
from epic_quant.errors import EpicQuantError
from epic_quant.report.blocks import Figure
from epic_quant.report.markdown import render
from epic_quant.report.sections import comparison
from epic_quant.report.writing import write_files
from epic_quant.results.reading import read_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and say where; 0 when it is written, 2 with one line on stderr when it cannot be."""
    options = _parser().parse_args(arguments)
    try:
        blocks = comparison(read_run(options.json))
        figures = {block.file_name: block.svg for block in blocks if isinstance(block, Figure)}
        # The text comes last, so that it never points to a plot that is not there.
        write_files(options.out, figures | {"COMPARISON.md": render(blocks)})
    except EpicQuantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.out / "COMPARISON.md")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m epic_quant.report",
        description="Make COMPARISON.md and its plots from the JSON of a run of the benchmarks.",
        epilog="example:\n  pytest benchmarks --benchmark-json out.json\n  python -m epic_quant.report out.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("json", type=Path, metavar="out.json", help="what --benchmark-json wrote")
    parser.add_argument("--out", type=Path, default=Path("reports"), metavar="FOLDER", help="default: reports")
    parser.add_argument("--version", action="version", version=f"epic_quant {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
