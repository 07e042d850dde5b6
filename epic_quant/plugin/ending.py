"""What stands at the end of a run: a table of what was measured, and the command that makes the report."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from tabulate import tabulate

from epic_quant.plugin.fixtures import RECORDS
from epic_quant.records import METRICS, Record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A short table of what was measured: `extra_info` has no column in pytest-benchmark's own."""
    records = config.stash.get(RECORDS, [])
    if not records:
        return
    rows = [_summary_row(made, benchmark) for made, benchmark in records]
    terminalreporter.section("epic_quant")
    terminalreporter.write_line(tabulate(rows, headers=["subject", "of", "measured", "median"], tablefmt="simple"))
    output = config.getoption("benchmark_json", None)
    if output:
        terminalreporter.write_line(f"\nreport: python -m epic_quant.report {shlex.quote(str(output))}")


def _summary_row(record: Record, benchmark: Any) -> list[str]:
    labels = " ".join(record.labels.values())
    measured = "  ".join(f"{name} {_short(name, value)}" for name, value in record.metrics.items())
    # A test that failed before its timed call has no stats.
    median = f"{benchmark.stats.stats.median * 1e3:.3g} ms" if benchmark.stats else "—"
    return [record.subject, labels, measured, median]


def _short(name: str, value: float | None) -> str:
    if value is None:
        return "—"
    if METRICS[name].unit == "B":
        return f"{value / 1e6:,.1f} MB"
    return f"{value:.3g}"
