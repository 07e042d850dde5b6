"""The session: its run, opened once; what is told before it, and what it adds to pytest-benchmark's JSON."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from epic_quant.errors import EpicQuantError
from epic_quant.plan import plan
from epic_quant.plugin.run import Run
from epic_quant.records import JSON_KEY

_RUN = pytest.StashKey[Run]()


def run_of(config: pytest.Config) -> Run:
    """The session's run, opened when a benchmark first needs it; what cannot be opened ends pytest with status 2."""
    if _RUN not in config.stash:
        try:
            config.stash[_RUN] = Run(config.option)
        except EpicQuantError as error:
            pytest.exit(str(error), returncode=2)
    return config.stash[_RUN]


def pytest_configure(config: pytest.Config) -> None:
    """Say at once what is wrong with the run, before anything is collected."""
    distributed = bool(getattr(config.option, "numprocesses", None))
    if config.getoption("benchmark_json", None) and (distributed or config.getoption("benchmark_disable", False)):
        reason = "tests run in several processes (-n)" if distributed else "--benchmark-disable was given"
        raise pytest.UsageError(f"no --benchmark-json can be written: nothing is timed, since {reason}")
    if runs_benchmarks(config):
        run_of(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let go of the checkpoint, which the JSON's run facts still needed after the last test."""
    if _RUN in config.stash:
        config.stash[_RUN].checkpoint.close()


def runs_benchmarks(config: pytest.Config) -> bool:
    return any("benchmarks" in Path(argument.partition("::")[0]).parts for argument in config.args)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name what is measured, where a run has been opened."""
    if not runs_benchmarks(config):
        return []
    run = run_of(config)
    kind = "the small trained model of this repository" if run.is_default else run.checkpoint.source
    rows = run.sampled_rows
    return [
        f"checkpoint: {kind}, {run.nbytes / 1e6:,.1f} MB, {run.config.num_layers} layers",
        f"policies: {', '.join(run.policies)}",
        f"errors on: {'all rows' if rows is None else f'{rows} rows of each tensor (--rows)'}",
    ]


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With `--plan`, print the plan in place of measuring anything."""
    if not session.config.option.plan:
        return None
    run = run_of(session.config)
    lines = plan(run.checkpoint, run.config, run.policies.values(), run.sampled_rows)
    planned = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if "qualities" in planned:
        lines += run.plan_of("quality", run.evaluated, run.num_windows)
    if "sensitivities" in planned and run.changes:
        variants = {name: change.variant() for name, change in run.changes.items()}
        lines += run.plan_of("sensitivity", variants, 2 * run.num_windows)
    print("\n".join([f"{len(session.items)} measurements would be made", *lines]))
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add the run facts and drop the raw timings; done twice it is the same as once."""
    if _RUN in config.stash and JSON_KEY not in output_json:
        output_json[JSON_KEY] = config.stash[_RUN].facts | {"arguments": _arguments(config)}
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


def _arguments(config: pytest.Config) -> str:
    """The command line, without the folders of the machine in front of file names."""
    shortened = (re.sub(r"(^|=)(/|[A-Za-z]:\\)[^=]*[/\\]", r"\1", word) for word in config.invocation_params.args)
    return shlex.join(["pytest", *shortened])
