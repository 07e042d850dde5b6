"""The end of a run: its JSON, its limits and its report, and the terminal's summary of these."""

from __future__ import annotations

import os
import shlex
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from traceback import walk_tb
from typing import Any

import pytest

from epic_quant.errors import EpicQuantError, ReportError
from epic_quant.plugin.journal import Measured, journal_of
from epic_quant.plugin.session import facts, is_distributed, runs_benchmarks, untimed
from epic_quant.records import JSON_KEY, METRICS
from epic_quant.report import terminal
from epic_quant.report.blocks import Table
from epic_quant.report.formatting import MISSING, with_unit
from epic_quant.report.sections import baseline as baseline_section
from epic_quant.report.sections import comparison, limits
from epic_quant.report.writing import write_report
from epic_quant.results.comparison import compare
from epic_quant.results.gate import Condition, LimitResult, check_baseline, check_limits
from epic_quant.results.reading import parse_run, read_run
from epic_quant.results.run import Run

_HEADLINE = "kl_divergence"


@dataclass
class Outcome:
    """The options for the end of a run, and its results."""

    conditions: Sequence[Condition]
    baseline: Run | None
    results: Sequence[LimitResult] = ()
    lines: list[str] = field(default_factory=list)
    error: str | None = None
    saved: bool = False


_OUTCOME = pytest.StashKey[Outcome]()


def pytest_configure(config: pytest.Config) -> None:
    """Check the limits, the baseline and the report's folder before the run."""
    options = config.option
    reason = untimed(config) if is_distributed(config) else None
    if reason and (options.fail_if or options.baseline or options.report) and not hasattr(config, "workerinput"):
        raise pytest.UsageError(f"no --report, --baseline or --fail-if: nothing is measured, since {reason}")
    try:
        conditions = [Condition.parse(text) for text in options.fail_if]
        check_baseline(conditions, options.baseline is not None)
        older = None if options.baseline is None else read_run(options.baseline)
        if options.report is not None:
            _check_folder(options.report)
    except EpicQuantError as error:
        pytest.exit(str(error), returncode=2)
    config.stash[_OUTCOME] = Outcome(conditions, older)


def _check_folder(folder: Path) -> None:
    """Raise ReportError where a report could not be written at the end; nothing is created."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ReportError(f"{folder}: no report can be written there: {there} is no folder that can be written to")


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_json(benchmarks: Any) -> None:
    """Leave out what was interrupted before its first round, on whose statistics pytest-benchmark would fail."""
    for benchmark in benchmarks:
        if not benchmark.stats.data:
            benchmark.fixture.has_error = True


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add the run facts and drop the raw timings; done twice it is the same as once."""
    if journal_of(config).records and JSON_KEY not in output_json:
        output_json[JSON_KEY] = _facts(config)
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
    config.stash[_OUTCOME].saved = True


@pytest.hookimpl(wrapper=True, specname="pytest_sessionfinish")
def pytest_sessionfinish_unwritten(session: pytest.Session) -> Generator[None]:
    """One line and status 2 where pytest-benchmark cannot write its JSON, as on a full disk; the partial file stays."""
    path: Path | None = session.config.getoption("benchmark_json", None)
    try:
        return (yield)
    except OSError as error:
        writes = any(
            frame.f_globals.get("__package__") == "pytest_benchmark" for frame, _ in walk_tb(error.__traceback__)
        )
        if path is None or not writes:
            raise
        path.unlink(missing_ok=True)
        outcome, writer = session.config.stash[_OUTCOME], journal_of(session.config).writer
        kept = "" if writer is None else f"; what was measured is in {writer.path}"
        outcome.saved, outcome.error = False, f"{path}: cannot be written: {error.strerror}{kept}"
        session.exitstatus = 2


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Check the run's limits and make its report; pytest-benchmark has written its JSON by now."""
    config = session.config
    journal, outcome = journal_of(config), config.stash[_OUTCOME]
    if journal.writer is not None:
        journal.writer.close()
        # Without a JSON the records are kept.
        if outcome.saved or not journal.records:
            journal.writer.path.unlink(missing_ok=True)
    options = config.option
    asked = outcome.conditions or outcome.baseline is not None or options.report is not None
    if not asked or options.plan or options.collectonly or is_distributed(config):
        return
    try:
        if not journal.planned:
            raise ReportError("no benchmark was run, so --fail-if, --baseline and --report have no results to use")
        _end(config, outcome)
    except EpicQuantError as error:
        outcome.error = str(error)
    if exitstatus == pytest.ExitCode.OK:
        if outcome.error is not None:
            session.exitstatus = 2
        elif any(one.fails for one in outcome.results):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _end(config: pytest.Config, outcome: Outcome) -> None:
    options = config.option
    run = _measured(config)
    outcome.results = check_limits(outcome.conditions, run, outcome.baseline, times=options.compare_times)
    compared = None
    if outcome.baseline is not None:
        compared = compare(run, outcome.baseline, times=options.compare_times)
        outcome.lines += [line.replace("`", "") for line in baseline_section.findings(compared)]
    if options.report is not None:
        blocks = comparison(run, compared, outcome.results)
        outcome.lines += [f"report: {path}" for path in write_report(run, blocks, options.report)]


def _measured(config: pytest.Config) -> Run:
    """What was measured, as a report reads it from the JSON. Raises ReportError where that is nothing."""
    journal = journal_of(config)
    failed = set(journal.failed)
    entries = [
        {"name": one.test, "extra_info": {JSON_KEY: one.record.to_json()}, "stats": {"median": one.median_s}}
        for one in journal.records
        if one.test not in failed
    ]
    now = datetime.now(UTC).isoformat()
    return parse_run({"datetime": now, JSON_KEY: _facts(config), "benchmarks": entries}, "this run")


def _facts(config: pytest.Config) -> dict[str, Any]:
    journal = journal_of(config)
    return facts(config) | {"failed": journal.failed, "missing": journal.missing}


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A short table of what was measured, what failed its limit, and where the JSON and the report are.

    It stands below pytest-benchmark's table of times, which may be long.
    """
    records, outcome = journal_of(config).records, config.stash[_OUTCOME]
    reason = untimed(config)
    if records or (reason and runs_benchmarks(config)) or outcome.error:
        terminalreporter.write_sep("=", "epic_quant")
    if reason and (records or runs_benchmarks(config)):
        what = "nothing was measured" if is_distributed(config) else "nothing was timed"
        terminalreporter.write_line(f"{what}, since {reason}", yellow=True)
    if records:
        table = every_record(records) if config.get_verbosity() > 0 else by_first_label(records)
        terminalreporter.write_line(terminal.render(table))
        terminalreporter.write_line("")
    if outcome.results:
        failed = any(one.fails for one in outcome.results)
        terminalreporter.write_line(limits.terminal_text(outcome.results), red=failed, green=not failed)
    writer = journal_of(config).writer
    if writer is not None and writer.error is not None:
        terminalreporter.write_line(f"{writer.error}; it lacks what was measured since", yellow=True)
    if outcome.error is not None:
        terminalreporter.write_line(f"error: {outcome.error}", red=True)
    for line in [*outcome.lines, *_ways_on(config, outcome)]:
        terminalreporter.write_line(line)


def _ways_on(config: pytest.Config, outcome: Outcome) -> Iterable[str]:
    """The path of the JSON, and the command that makes a report where none was made."""
    output, options = config.getoption("benchmark_json", None), config.option
    if output is None or not outcome.saved:
        return
    yield f"JSON: {output}"
    if options.report is None:
        words = ["--baseline", str(options.baseline)] if options.baseline is not None else []
        yield f"report: {shlex.join(['python', '-m', 'epic_quant.report', str(output), *words])}"


def every_record(records: Iterable[Measured]) -> Table:
    """A row for each record."""
    return _table((one.record.subject, " ".join(one.record.labels.values()), [one]) for one in records)


def by_first_label(records: Iterable[Measured]) -> Table:
    """A row for the records of a subject with one first label, such as the policy; values from least to most."""
    groups: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    for one in records:
        groups[one.record.subject, next(iter(one.record.labels.values()), "")].append(one)
    return _table((subject, name, group) for (subject, name), group in groups.items())


def _table(rows: Iterable[tuple[str, str, Sequence[Measured]]]) -> Table:
    cells = ((subject, name, *_headline(group), _median(group)) for subject, name, group in rows)
    return Table(("subject", "of", "metric", "value", "median time"), tuple(cells), num_text_columns=3)


def _headline(group: Sequence[Measured]) -> tuple[str, str]:
    """The divergence, or where there is none the first metric that was measured, and its values."""
    values: dict[str, list[float]] = defaultdict(list)
    for one in group:
        for name, value in one.record.metrics.items():
            if value is not None:
                values[name].append(value)
    if not values:
        return MISSING, MISSING
    name = _HEADLINE if _HEADLINE in values else next(iter(values))
    return name, _range(name, values[name])


def _median(group: Sequence[Measured]) -> str:
    times = [one.median_s for one in group if one.median_s is not None]
    return _range("time_s", times) if times else MISSING


def _range(name: str, values: Sequence[float]) -> str:
    """`0.081…0.093`, or one value where they read alike."""
    least, most = (with_unit(METRICS[name], value) for value in (min(values), max(values)))
    return most if least == most else f"{least.partition(' ')[0]}…{most}"
