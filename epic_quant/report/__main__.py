"""`python -m epic_quant.report out.json`: the report's command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from epic_quant import command_line
from epic_quant.errors import ReportError
from epic_quant.report import writing
from epic_quant.report.sections import comparison
from epic_quant.results.reading import read_run

_STDOUT = Path("-")


@command_line.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and say where: 0 when it is written, 2 with one line on stderr when it cannot be."""
    options = _parser().parse_args(arguments)
    if options.out == _STDOUT and len(options.format) > 1:
        raise ReportError("--out - prints one format: name it with --format")
    run = read_run(options.json)
    blocks = comparison(run)
    if options.out == _STDOUT:
        command_line.print_text(writing.text(run, blocks, *options.format))
    else:
        for path in writing.write_report(run, blocks, options.out, options.format):
            print(path)
    return 0


def _formats(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in writing.FILE_NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is no format; known: {', '.join(writing.FILE_NAMES)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser(
        "report",
        "Make a report of the JSON of a run of the benchmarks.",
        [
            "pytest benchmarks --benchmark-json out.json",
            "python -m epic_quant.report out.json --out reports",
            "python -m epic_quant.report out.json --format csv --out - | head",
        ],
        "0; 2 where the report cannot be made.",
    )
    parser.add_argument("json", type=Path, metavar="out.json", help="what --benchmark-json wrote")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("reports"),
        metavar="DIR",
        help="folder to write to, - for standard output (reports)",
    )
    parser.add_argument(
        "--format",
        type=_formats,
        default=",".join(writing.DEFAULT_FORMATS),
        metavar="NAMES",
        help="md, html and csv, one or more parted by commas (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    command_line.leave(main)
