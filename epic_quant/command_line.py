"""What all command lines share: one line and status 2 for bad input, a reader that stops early, `--version`."""

from __future__ import annotations

import argparse
import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from epic_quant import __version__
from epic_quant.errors import EpicQuantError

_Main = Callable[[Sequence[str] | None], int]

# What a shell reports of a program that SIGPIPE and SIGINT end.
BROKEN_PIPE, INTERRUPTED = 141, 130


def parser(module: str, description: str, examples: Sequence[str], statuses: str) -> argparse.ArgumentParser:
    """A parser of `python -m epic_quant.MODULE` whose help ends with examples and what its exit statuses say."""
    lines = ["examples:", *(f"  {example}" for example in examples), "", f"exit status: {statuses}"]
    made = argparse.ArgumentParser(
        prog=f"python -m epic_quant.{module}",
        description=description,
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"epic_quant {__version__}")
    return made


def reports_errors(main: _Main) -> Callable[..., int]:
    """Make a `main` print what it raises for bad input as one line on stderr, and return 2."""

    @functools.wraps(main)
    def wrapped(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except EpicQuantError as error:
            # A path or a name in it may hold a line break.
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2

    return wrapped


def print_text(text: str) -> None:
    """Text to standard output in UTF-8, with the line breaks that it has, whatever the system's own are."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    sys.stdout.write(text)


def leave(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with its status; quietly where whoever reads its output has closed it, or on Ctrl-C."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush what is left once more when it exits, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)
