"""A running benchmark's file, `OUT.partial.jsonl`, from which a report can be made if the run never ends.

The first line has the run's facts and the tests that are planned, each further one a record as it is made, or what
became of a test and its median time. The file goes when pytest-benchmark's JSON is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from epic_quant.errors import ReportError
from epic_quant.files import atomic
from epic_quant.records import JSON_KEY, Record

SUFFIX = ".partial.jsonl"

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


def partial_path(json_path: Path) -> Path:
    """Where the records of a run are kept that writes its JSON to `json_path`: out.partial.jsonl for out.json."""
    return json_path.parent / f"{json_path.stem}{SUFFIX}"


class PartialWriter:
    """Appends to a partial file, a line at a time, each flushed to the system as it is written.

    Where that fails, as on a full disk, `error` says why, and no more is written: the run can go on without it.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], planned: Sequence[str]) -> None:
        """Put a new file, with its first line, in the place of an old one.

        Raises ReportError where it cannot be written, with what was there before still there.
        """
        self.path = path
        self.error: str | None = None
        first = {"datetime": datetime.now(UTC).isoformat(), JSON_KEY: facts, "planned": planned}
        try:
            with atomic(path) as unfinished:
                unfinished.write_text(_line(first), encoding="utf-8", newline="\n")
            self._file = path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise ReportError(self._cannot(error)) from error

    def record(self, test: str, record: Record) -> None:
        """Append a record of a test that still runs."""
        self._append({"test": test, "record": record.to_json()})

    def finished(self, test: str, outcome: str, median_s: float | None) -> None:
        """Append the outcome of a test: passed, failed or skipped, and its median time where it has one."""
        self._append({"test": test, "outcome": outcome, "median": median_s})

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError as error:  # what could not be written before is tried again
            self.error = self._cannot(error)

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self.error is not None:
            return
        try:
            self._file.write(_line(entry))
            self._file.flush()
        except OSError as error:
            self.error = self._cannot(error)

    def _cannot(self, error: OSError) -> str:
        return f"{self.path}: cannot be written: {error.strerror}"


def read_partial(path: Path) -> dict[str, Any]:
    """The file as pytest-benchmark's JSON has a run, with two more facts: the tests that failed and those `missing`.

    Missing is what had not ended. A last line that was cut off is left out. Raises ReportError where the file cannot
    be read, or any other line is not what is written here.
    """
    entries = _entries(path)
    first = next(entries, None)
    if first is None or not isinstance(first.get(JSON_KEY), dict) or not _is_text_list(first.get("planned")):
        raise ReportError(f"{path}: does not begin with the facts of a run and the tests that it planned")
    records: list[tuple[str, Any]] = []
    outcomes: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        test = entry.get("test")
        if not isinstance(test, str) or ("record" in entry) == ("outcome" in entry):
            raise ReportError(f"{path}: holds a line that is neither a record nor the outcome of a test: {entry}")
        if "record" in entry:
            records.append((test, entry["record"]))
        else:
            outcomes[test] = entry
    failed = [test for test, entry in outcomes.items() if entry["outcome"] == FAILED]
    facts = first[JSON_KEY] | {
        "failed": failed,
        "missing": [test for test in first["planned"] if test not in outcomes],
    }
    benchmarks = [
        {
            "name": test.rpartition("::")[2],
            "fullname": test,
            "extra_info": {JSON_KEY: record},
            "stats": {"median": outcomes.get(test, {}).get("median")},
        }
        for test, record in records
        if test not in failed
    ]
    return {"datetime": first.get("datetime"), JSON_KEY: facts, "benchmarks": benchmarks}


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=True) + "\n"


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
    # What follows the last end of a line was being written when the run stopped.
    for number, line in enumerate(lines[:-1], 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ReportError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise ReportError(f"{path}: line {number} is {entry!r}, expected an object")
        yield entry


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
