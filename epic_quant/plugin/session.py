"""The session: its run, opened once; what is printed before it, and what it adds to pytest-benchmark's JSON."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from typing import Any

import pytest

from epic_quant import kernels
from epic_quant.errors import EpicQuantError
from epic_quant.plugin.run import BENCHMARKS, Run

_RUN = pytest.StashKey[Run]()


def run_of(config: pytest.Config) -> Run:
    """The session's run, opened when a benchmark first needs it; what cannot be opened ends pytest with status 2."""
    if _RUN not in config.stash:
        try:
            config.stash[_RUN] = Run(config.option, config.rootpath)
        except EpicQuantError as error:
            pytest.exit(str(error), returncode=2)
    return config.stash[_RUN]


def pytest_configure(config: pytest.Config) -> None:
    """Check the run's options and files before anything is collected."""
    reason = untimed(config)
    if reason and config.getoption("benchmark_json", None):
        raise pytest.UsageError(f"no --benchmark-json can be written: nothing is timed, since {reason}")
    for option, value in pairwise(config.invocation_params.args):
        if option == "--policy" and value.startswith("@"):
            # pytest puts the file's lines in its place before a plugin sees it, and has no option against that.
            pytest.exit(f"{option} {value}: pytest takes the file's lines as arguments; write {option}={value}", 2)
    if runs_benchmarks(config):
        run_of(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close the checkpoint, which the JSON's run facts still needed after the last test."""
    if _RUN in config.stash:
        config.stash[_RUN].checkpoint.close()


def is_distributed(config: pytest.Config) -> bool:
    """Whether pytest-xdist runs the tests in several processes, of which this may be one."""
    return hasattr(config, "workerinput") or config.getoption("dist", "no") != "no"


def untimed(config: pytest.Config) -> str | None:
    """Why pytest-benchmark times nothing in this session; None where it does."""
    if is_distributed(config):
        return "tests run in several processes (-n)"
    disabled = config.getoption("benchmark_disable", False) and not config.getoption("benchmark_enable", False)
    return "--benchmark-disable was given" if disabled else None


def runs_benchmarks(config: pytest.Config) -> bool:
    """Whether a file or folder of benchmarks was named on the command line."""
    folder, benchmarks = config.invocation_params.dir, (config.rootpath / BENCHMARKS).resolve()
    paths = ((folder / argument.partition("::")[0]).resolve() for argument in config.args)
    return any(benchmarks in (path, *path.parents) for path in paths)


def facts(config: pytest.Config) -> dict[str, Any]:
    """The run's facts, with the command line, without the folders of the machine in front of file names."""
    shortened = (
        re.sub(r"(^@?|=@?|\bfile:)(/|[A-Za-z]:\\)[^=]*[/\\]", r"\1", word) for word in config.invocation_params.args
    )
    return run_of(config).facts | {"arguments": shlex.join(["pytest", *shortened])}


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name what computes with packed weights, and what is measured, where a run has been opened."""
    try:
        computes = f"kernels: {kernels.description()}"
    except EpicQuantError as error:
        pytest.exit(str(error), returncode=2)
    if not runs_benchmarks(config):
        return [computes]
    run = run_of(config)
    kind = "the small trained model of this repository" if run.is_default else run.checkpoint.source
    rows = run.sampled_rows
    return [
        computes,
        f"checkpoint: {kind}, {run.nbytes / 1e6:,.1f} MB, {run.config.num_layers} layers",
        f"policies: {', '.join(run.policies)}",
        *(f"published: {name}, {'; '.join(lines)}" for name, lines in run.published_files.items()),
        *(f"left out: {name}, {reason}" for name, reason in run.left_out.items()),
        f"errors on: {'all rows' if rows is None else f'{rows} rows of each tensor (--rows)'}",
    ]
