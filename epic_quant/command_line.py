"""What all command lines share: one line and status 2 for bad input, closed pipes, `--version`."""

from __future__ import annotations

import argparse
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from epic_quant import __version__
from epic_quant.errors import EpicQuantError, SpecError
from epic_quant.files import read_text, user_path
from epic_quant.spec import NAMED, NOISE_FLOOR, PolicySpec

_Main = Callable[[Sequence[str] | None], int]

# What a shell reports of a program that SIGPIPE and SIGINT end.
BROKEN_PIPE, INTERRUPTED = 141, 130


class _Parser(argparse.ArgumentParser):
    """Refuses what is empty, as it is where a variable of the shell is not set."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        for before, argument in zip(["", *given], given, strict=False):
            name, is_joined, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
            if (is_joined or not name) and not value.strip():
                self.error(f"argument {name or before}: is empty; is a variable of the shell not set?")
        return super().parse_known_args(given, namespace)


def parser(module: str, description: str, examples: Sequence[str], statuses: str) -> argparse.ArgumentParser:
    """A parser of `python -m epic_quant.MODULE` whose help ends with examples and exit statuses."""
    lines = ["examples:", *(f"  {example}" for example in examples), "", f"exit status: {statuses}"]
    made = _Parser(
        prog=f"python -m epic_quant.{module}",
        description=description,
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"epic_quant {__version__}")
    return made


def add_checkpoint(parser: argparse.ArgumentParser, *companions: str) -> None:
    """Add `source`, a checkpoint, and the options that name its `companions`: config, tokenizer."""
    parser.add_argument("source", help="a .safetensors file, a folder, or a hub id in the local cache")
    for name in companions:
        parser.add_argument(f"--{name}", metavar="FILE", help=f"{name}.json, where it is not beside the checkpoint")


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


def policy_of(text: str) -> PolicySpec:
    """The policy that an argument gives: its name, its string, `[NAME=]file:PATH`, or `@FILE` with one of them in it.

    In a file, white space and line breaks are ignored. The policy gets the file's name without its suffix.
    Raises SpecError where the file cannot be read, is empty or has the name of another policy, and as
    `PolicySpec.parse`.
    """
    if not text.startswith("@"):
        policy = PolicySpec.parse(text)
        if policy.file is not None:
            _check_name(policy, text, f"name it, as OTHER=file:{policy.file}")
        return policy
    path = user_path(text[1:])
    try:
        content = "".join(read_text(path).split())
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; expected one that holds a policy") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: cannot be read as a policy: {error}") from error
    if not content:
        raise SpecError(f"{path}: is empty; expected a policy")
    try:
        policy = PolicySpec.parse(content).renamed(path.stem)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error
    _check_name(policy, str(path), "rename the file")
    return policy


def _check_name(policy: PolicySpec, source: str, remedy: str) -> None:
    """Raise SpecError where a policy is called as another one."""
    if policy.name == NOISE_FLOOR or NAMED.get(policy.name, policy) != policy:
        raise SpecError(f"{source}: {policy.name} is the name of another policy; {remedy}")


def print_text(text: str) -> None:
    """Print text to standard output in UTF-8, with its line breaks unchanged on every system."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    sys.stdout.write(text)


def leave(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with its status; without a traceback on a closed pipe or Ctrl-C.

    SIGTERM and SIGHUP, which end Python at once, leave by way of every `finally`, so that nothing unfinished stays;
    and so does Ctrl-C, which ends at once what is run with `-m` while it is imported (`epic_quant/__init__.py`).
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP; nohup has it ignored.
        if (number := getattr(signal, name, None)) is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _stopped)
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush the rest again at exit, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)


def _stopped(number: int, _frame: object) -> NoReturn:
    """End with what a shell reports of a program that the signal ends."""
    sys.exit(128 + number)
