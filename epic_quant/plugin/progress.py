"""While benchmarks run: what is measured, on which checkpoint, how far, how long still.

On a terminal that is one line a subject, written anew for every measurement in the place of pytest's dots. Elsewhere,
and with `-v`, a line stands before each subject, and now and then within a long one.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from epic_quant.plugin.journal import Journal, journal_of
from epic_quant.plugin.session import run_of
from epic_quant.results.partial import FAILED

# In a log, a line at most this often within one subject.
_LOGGED_EVERY_S = 60.0


class Remaining:
    """How long the rest of a run takes, from the tests that have ended.

    A test takes as long as the others of its function; the first of these also set up what all share, so it counts only
    while it is alone, and where no time of the function is `known` from an earlier run. Of a function without any time
    it takes as long as any test.
    """

    def __init__(self, planned: Sequence[str], known: dict[str, float]) -> None:
        self._left = Counter(map(_function, planned))
        self._known = known
        self._took: dict[str, list[float]] = {}

    def ended(self, test: str, seconds: float) -> None:
        """Note a test's time, with what was set up for it."""
        self._left[_function(test)] -= 1
        self._took.setdefault(_function(test), []).append(seconds)

    @property
    def seconds(self) -> float | None:
        """The time of all that is left; None before anything is known of any test."""
        if not self._took and not self._known:
            return None
        of_any = mean([seconds for took in self._took.values() for seconds in took] or self._known.values())
        expected = {function: mean(took) for function, took in self._took.items()} | self._known
        expected |= {function: mean(took[1:]) for function, took in self._took.items() if len(took) > 1}
        return sum(count * expected.get(function, of_any) for function, count in self._left.items())

    @property
    def means(self) -> dict[str, float]:
        """The mean time of a test of each function, for a later run."""
        return {function: mean(took) for function, took in self._took.items()}


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """Tells on pytest's terminal how far the planned tests are."""

    def __init__(
        self, reporter: Any, journal: Journal, checkpoint: str, remaining: Remaining, *, in_place: bool
    ) -> None:
        self._reporter, self._journal, self._checkpoint, self._in_place = reporter, journal, checkpoint, in_place
        self._remaining = remaining
        self._planned = set(journal.planned)
        self._of_subject = Counter(map(_subject, journal.planned))
        self._ended: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._subject: str | None = None
        self._subject_began_s = self._test_began_s = self._told_s = 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Say what is measured next."""
        self._test_began_s = time.monotonic()
        subject = _subject(nodeid) if nodeid in self._planned else None
        if subject != self._subject:
            self._end_subject()
            self._begin_subject(subject)
        if subject is None:
            return
        if self._in_place:
            self._rewrite(self._line(self._whole(), _parameters(nodeid)))
        elif self._test_began_s - self._told_s > _LOGGED_EVERY_S:
            self._tell_apart()

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.CollectReport | pytest.TestReport) -> Any:
        """Take pytest's dots away where the line is written anew; what fails is told by a line of its own."""
        replaced = self._in_place and report.nodeid in self._planned and not hasattr(report, "wasxfail")
        if not replaced or (report.passed and report.when != "call"):
            return None
        return "error" if report.failed and report.when != "call" else report.outcome, "", ""

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test that has ended; the journal knows by now what became of it."""
        if report.nodeid not in self._planned:
            return
        if report.failed and self._in_place:
            self._rewrite("")
            self._reporter.rewrite(f"FAILED {report.nodeid}\n", red=True)
        if report.when == "teardown":
            self._ended[_subject(report.nodeid)] += 1
            self._failed[_subject(report.nodeid)] += self._journal.outcomes[report.nodeid] == FAILED
            self._remaining.ended(report.nodeid, time.monotonic() - self._test_began_s)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        """End the last subject's line, however the loop ends."""
        try:
            return (yield)
        finally:
            self._end_subject()

    def _begin_subject(self, subject: str | None) -> None:
        self._subject, self._subject_began_s = subject, time.monotonic()
        if subject is not None and self._in_place:
            self._reporter.ensure_newline()
            # The line of the subject stands where pytest would write the file's name.
            self._reporter.showfspath = False
        elif subject is not None:
            self._tell_apart()

    def _end_subject(self) -> None:
        if self._subject is not None and self._in_place:
            self._rewrite(self._line(f"took {clock(time.monotonic() - self._subject_began_s)}"))
            self._reporter.write_line("")
            self._reporter.showfspath = None
        self._subject = None

    def _tell_apart(self) -> None:
        self._reporter.ensure_newline()
        self._reporter.write_line(self._line(self._whole()), cyan=True)
        self._told_s = time.monotonic()

    def _line(self, *parts: str) -> str:
        subject = self._subject or ""
        failed = [f"{self._failed[subject]} failed"] if self._failed[subject] else []
        far = f"{subject} {self._ended[subject]}/{self._of_subject[subject]} on {self._checkpoint}"
        return " · ".join([far, *failed, *parts])

    def _whole(self) -> str:
        """How far the whole run is, and how long it still takes."""
        share, left = self._ended.total() / len(self._planned), self._remaining.seconds
        return f"{share:.0%} of the run" + ("" if left is None else f", about {clock(left)} left")

    def _rewrite(self, text: str) -> None:
        # One column stays free, or the terminal goes on to the next line.
        self._reporter.rewrite(text[: shutil.get_terminal_size().columns - 1], erase=True)
        self._reporter.flush()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to tell, where benchmarks were planned and there is a terminal to tell it on."""
    config = session.config
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    journal = journal_of(config)
    if not journal.planned or reporter is None:
        return
    in_place = reporter.isatty and os.environ.get("TERM") != "dumb" and config.get_verbosity() <= 0
    run = run_of(config)
    cache: pytest.Cache | None = getattr(config, "cache", None)
    key = f"epic_quant/seconds/{run.checkpoint.fingerprint}"
    known: dict[str, float] = {} if cache is None else cache.get(key, {})
    remaining = Remaining(journal.planned, known)
    progress = Progress(reporter, journal, Path(run.name).name, remaining, in_place=in_place)
    config.pluginmanager.register(progress, "epic_quant progress")
    if cache is not None:
        config.add_cleanup(lambda: cache.set(key, known | remaining.means))


def _function(test: str) -> str:
    return test.partition("[")[0]


def _subject(test: str) -> str:
    return Path(test.partition("::")[0]).stem.removeprefix("test_")


def _parameters(test: str) -> str:
    name, _, parameters = test.rpartition("::")[2].partition("[")
    return parameters.removesuffix("]") or name
