"""While benchmarks run: what is measured, on which checkpoint, the share done, and the time left.

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
    """How long the rest of a run takes, from the tests that have ended and from an earlier run.

    The first test of a function also sets up what all share, so it is known apart from the others: `known` has two
    times for a function, in seconds, of its first test and of each further one. A further one takes as long as those
    that have ended; where none has, as in the earlier run; else as the first took when all was set up. Of a function
    without any time every test takes as long as those of the other functions.
    """

    def __init__(self, planned: Sequence[str], known: dict[str, tuple[float, float]]) -> None:
        self._left = Counter(map(_function, planned))
        self._known = known
        self._took: dict[str, list[tuple[float, float]]] = {}

    def ended(self, test: str, setup_s: float, rest_s: float) -> None:
        """Note a test's time: of what was set up for it, and of all else."""
        self._left[_function(test)] -= 1
        self._took.setdefault(_function(test), []).append((setup_s, rest_s))

    @property
    def seconds(self) -> float | None:
        """The time of all that is left; None before anything is known of any test."""
        times = self._known | self.times
        if not times:
            return None
        of_any = mean(each for _, each in times.values())
        total = 0.0
        for function, left in self._left.items():
            first, each = times.get(function, (of_any, of_any))
            total += left * each + (first - each if left and function not in self._took else 0)
        return total

    @property
    def times(self) -> dict[str, tuple[float, float]]:
        """The two times of each function that has run, for a later run."""
        return {function: (sum(took[0]), self._each(function)) for function, took in self._took.items()}

    def _each(self, function: str) -> float:
        (_, rest_s), *others = self._took[function]
        if others:
            return mean(map(sum, others))
        return self._known[function][1] if function in self._known else rest_s


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """Shows on pytest's terminal how many of the planned tests have ended."""

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
        self._subject_began_s = self._test_began_s = self._setup_s = self._told_s = 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Show what is measured next."""
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
        """Take pytest's dots away where the line is written anew; a failure gets its own line."""
        replaced = self._in_place and report.nodeid in self._planned and not hasattr(report, "wasxfail")
        if not replaced or (report.passed and report.when != "call"):
            return None
        return "error" if report.failed and report.when != "call" else report.outcome, "", ""

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test that has ended; the journal already has its outcome."""
        if report.nodeid not in self._planned:
            return
        if report.failed and self._in_place:
            self._rewrite("")
            self._reporter.rewrite(f"FAILED {report.nodeid}\n", red=True)
        if report.when == "setup":
            self._setup_s = report.duration
        if report.when == "teardown":
            self._ended[_subject(report.nodeid)] += 1
            self._failed[_subject(report.nodeid)] += self._journal.outcomes[report.nodeid] == FAILED
            rest_s = time.monotonic() - self._test_began_s - self._setup_s
            self._remaining.ended(report.nodeid, self._setup_s, rest_s)

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
    """Start the display where benchmarks were planned and there is a terminal."""
    config = session.config
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    journal = journal_of(config)
    if not journal.planned or reporter is None:
        return
    in_place = reporter.isatty and os.environ.get("TERM") != "dumb" and config.get_verbosity() <= 0
    run, known = run_of(config), times_of(config)
    remaining = Remaining(journal.planned, known)
    progress = Progress(reporter, journal, Path(run.name).name, remaining, in_place=in_place)
    config.pluginmanager.register(progress, "epic_quant progress")
    if (cache := _cache(config)) is not None:
        config.add_cleanup(lambda: cache.set(_key(config), known | remaining.times))


def times_of(config: pytest.Config) -> dict[str, tuple[float, float]]:
    """The times of each function in earlier runs on this checkpoint, as `Remaining` takes them."""
    cache = _cache(config)
    return {} if cache is None else cache.get(_key(config), {})


def _cache(config: pytest.Config) -> pytest.Cache | None:
    return getattr(config, "cache", None)


def _key(config: pytest.Config) -> str:
    return f"epic_quant/times/{run_of(config).checkpoint.fingerprint}"


def _function(test: str) -> str:
    return test.partition("[")[0]


def _subject(test: str) -> str:
    return Path(test.partition("::")[0]).stem.removeprefix("test_")


def _parameters(test: str) -> str:
    name, _, parameters = test.rpartition("::")[2].partition("[")
    return parameters.removesuffix("]") or name
