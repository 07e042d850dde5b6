"""`python -m epic_quant.report out.json`: the report's command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from epic_quant import command_line
from epic_quant.errors import ReportError
from epic_quant.files import user_path
from epic_quant.report import writing
from epic_quant.report.sections import comparison, limits
from epic_quant.results import gate
from epic_quant.results.comparison import compare
from epic_quant.results.gate import Condition, check_baseline, check_limits
from epic_quant.results.partial import partial_path
from epic_quant.results.reading import data_path, read_run

_STDOUT = Path("-")


@command_line.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print its paths; 0, 1 if the run fails a limit, or 2 if the report cannot be made."""
    options = _parser().parse_args(arguments)
    if options.out == _STDOUT and len(options.format) > 1:
        raise ReportError("--out - prints one format: name it with --format")
    conditions = [Condition.parse(text) for text in options.fail_if]
    check_baseline(conditions, options.baseline is not None)
    run = read_run(options.json)
    older = None if options.baseline is None else read_run(options.baseline)
    results = check_limits(conditions, run, older, times=options.compare_times)
    compared = None if older is None else compare(run, older, times=options.compare_times)
    blocks = comparison(run, compared, results)
    if options.out == _STDOUT:
        command_line.print_text(writing.text(run, blocks, *options.format))
    else:
        for path in writing.write_report(run, blocks, options.out, options.format):
            print(path)
    for note in _notes(options.json):
        print(f"note: {note}", file=sys.stderr)
    if results:
        print(limits.terminal_text(results), file=sys.stderr)
    return 1 if any(one.fails for one in results) else 0


def _notes(path: Path) -> Iterator[str]:
    """Notes for the user on the file that was read."""
    source, beside = data_path(path), partial_path(path)
    if source != path:
        yield f"{path} was not written to its end; the report is made of {source}"
    elif beside != path and beside.is_file():
        yield f"{beside} is of a run that did not end; to report on that one, name it"


def _formats(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in writing.FILE_NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is not a format; known: {', '.join(writing.FILE_NAMES)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser(
        "report",
        "Make a report of the JSON of a run of the benchmarks.",
        [
            "pytest benchmarks --benchmark-json out.json",
            "python -m epic_quant.report out.json --out reports",
            "python -m epic_quant.report out.json --format csv --out - | head",
            "python -m epic_quant.report out.json --baseline old.json --fail-if 'kl_divergence[subject=quality]:+5%'",
        ],
        "0; 1 where a value fails a limit of --fail-if; 2 where the report cannot be made.",
    )
    parser.add_argument("json", type=user_path, metavar="out.json", help="what --benchmark-json wrote")
    parser.add_argument(
        "--out",
        type=user_path,
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
    parser.add_argument(
        "--baseline", type=user_path, metavar="old.json", help="an older run, to show every value beside what it was"
    )
    parser.add_argument("--compare-times", action="store_true", help="compare times of different machines too")
    parser.add_argument("--fail-if", action="append", default=[], metavar=gate.METAVAR, help=gate.HELP)
    return parser


if __name__ == "__main__":
    command_line.leave(main)
