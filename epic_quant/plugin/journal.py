"""The planned tests, their records and outcomes, kept as they come; also on disk if a JSON is requested."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from epic_quant.errors import EpicQuantError
from epic_quant.plugin.session import facts, is_distributed, run_of
from epic_quant.records import Record
from epic_quant.results.partial import FAILED, PASSED, SKIPPED, PartialWriter, partial_path

_JOURNAL = pytest.StashKey["Journal"]()


@dataclass(frozen=True)
class Measured:
    """A record, the test that made it, and pytest-benchmark's fixture, which has the times."""

    test: str
    record: Record
    benchmark: Any

    @property
    def median_s(self) -> float | None:
        """The median time; None where nothing was timed, as in a test that failed before."""
        stats = self.benchmark.stats
        return stats.stats.median if stats and stats.stats.rounds else None


class Journal:
    """One session's: the planned tests, those that have made records, and the outcome of each."""

    def __init__(self) -> None:
        self.planned: list[str] = []
        self.records: list[Measured] = []
        self.outcomes: dict[str, str] = {}
        self.writer: PartialWriter | None = None
        self._latest: dict[str, str] = {}

    def record(self, measured: Measured) -> None:
        """Keep a record of a test that still runs."""
        self.records.append(measured)
        if self.writer is not None:
            self.writer.record(measured.test, measured.record)

    @property
    def failed(self) -> list[str]:
        """The planned tests that failed."""
        return [test for test in self.planned if self.outcomes.get(test) == FAILED]

    @property
    def missing(self) -> list[str]:
        """The planned tests that have not ended."""
        return [test for test in self.planned if test not in self.outcomes]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Store a test's outcome when its last phase has ended."""
        worst = max(self._latest.get(report.nodeid, PASSED), report.outcome, key=(PASSED, SKIPPED, FAILED).index)
        self._latest[report.nodeid] = worst
        if report.when != "teardown":
            return
        self.outcomes[report.nodeid] = self._latest.pop(report.nodeid)
        if self.writer is not None:
            made = next((one for one in reversed(self.records) if one.test == report.nodeid), None)
            self.writer.finished(report.nodeid, worst, None if made is None else made.median_s)


def journal_of(config: pytest.Config) -> Journal:
    """The session's journal."""
    return config.stash[_JOURNAL]


def pytest_configure(config: pytest.Config) -> None:
    """Begin the journal."""
    config.stash[_JOURNAL] = Journal()
    config.pluginmanager.register(config.stash[_JOURNAL], "epic_quant journal")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Before the first test: check what all of them will read, and put the partial file in its place."""
    config = session.config
    items = [item for item in session.items if {"record", "benchmark"} <= set(getattr(item, "fixturenames", ()))]
    if not items or config.option.plan or config.option.collectonly or is_distributed(config):
        return
    journal = journal_of(config)
    journal.planned = [item.nodeid for item in items]
    try:
        run_of(config).check_inputs({name for item in items for name in getattr(item, "fixturenames", ())})
        json_path: Path | None = config.getoption("benchmark_json", None)
        if json_path is not None:
            journal.writer = PartialWriter(partial_path(json_path), facts(config), journal.planned)
    except EpicQuantError as error:
        pytest.exit(str(error), returncode=2)
