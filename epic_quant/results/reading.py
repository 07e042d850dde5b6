"""pytest-benchmark's JSON to a `Run`; all that can be wrong with the file is found here."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from epic_quant.errors import ReportError, SpecError
from epic_quant.files import read_text
from epic_quant.records import FINGERPRINT, JSON_KEY, SCHEMA_VERSION, Record
from epic_quant.records.subjects import SUBJECTS
from epic_quant.results.partial import SUFFIX, partial_path, read_partial
from epic_quant.results.run import Run

HOW_TO_MAKE_ONE = "make one with: pytest benchmarks --benchmark-json out.json"

# What is read of the facts, where it is there.
_NUMBERS = ("read_bandwidth_gbs", "context", "nbytes")
_NAMES = ("policies", "layer_types", "missing", "failed")
_MAPPINGS = ("versions", "policy_strings")


def read_run(path: Path) -> Run:
    """The run that a JSON file holds, or a partial file: see `data_path`.

    Raises ReportError on a file that cannot be read, is no JSON or cut off, is not pytest-benchmark's, has no records
    of epic_quant, is of another schema, has a damaged record, or has records
    of two checkpoints or the same subject and labels twice, as where two runs were put together.
    """
    source = data_path(path)
    return parse_run(read_partial(source) if _is_partial(source) else _json(source), str(source))


def data_path(path: Path) -> Path:
    """The file that the run of `path` is read from.

    It is the path, but where that is a JSON file that is not there, or was cut off when the run stopped, and the run's
    partial file is.
    """
    beside = partial_path(path)
    if _is_partial(path) or not os.path.isfile(beside):
        return path
    try:
        _json(path)
    except ReportError:
        return beside
    return path


def parse_run(data: Any, name: str) -> Run:
    """The run in what a JSON file holds; raises ReportError, naming it, as `read_run`."""
    if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list):
        raise ReportError(
            f"{name}: not a JSON file of pytest-benchmark, which has a list 'benchmarks'; {HOW_TO_MAKE_ONE}"
        )
    facts = data.get(JSON_KEY)
    entries = [entry for entry in data["benchmarks"] if _extra_info(entry).get(JSON_KEY) is not None]
    if not isinstance(facts, dict) or not entries:
        raise ReportError(f"{name}: holds no records of epic_quant; {HOW_TO_MAKE_ONE}")
    _check_facts(name, facts)
    records = tuple(_record(name, entry) for entry in entries)
    _check_fingerprints(name, [facts["checkpoint"], *(entry["extra_info"][JSON_KEY] for entry in entries)])
    of_each = Counter((record.subject, tuple(sorted(record.labels.items()))) for record in records)
    for (subject, labels), count in of_each.items():
        if count > 1:
            said = " ".join([subject, *(f"{label}={value}" for label, value in labels)])
            raise ReportError(f"{name}: has {count} records of {said}; expected the records of one run, each once")
    run = Run({**_measured(data), **facts}, records)
    try:
        _ = run.policies
    except (SpecError, TypeError) as error:
        raise ReportError(f"{name}: damaged run facts: {error}") from error
    return run


def _is_partial(path: Path) -> bool:
    return path.name.endswith(SUFFIX)


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file; {HOW_TO_MAKE_ONE}") from None
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
    # ValueError is of text that is not UTF-8, of what is no JSON, and of integers too long to convert.
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not JSON, or cut off: {error}") from error


def _measured(data: Mapping[str, Any]) -> dict[str, str]:
    """The day and minute that pytest-benchmark gives, `2026-11-24 14:07 UTC`, as a fact of the run."""
    try:
        when = datetime.fromisoformat(data["datetime"]).astimezone(UTC)
    except (KeyError, TypeError, ValueError, OverflowError):
        return {}
    return {"measured": f"{when:%Y-%m-%d %H:%M} UTC"}


def _extra_info(entry: Any) -> Mapping[str, Any]:
    info = entry.get("extra_info") if isinstance(entry, dict) else None
    return info if isinstance(info, dict) else {}


def _check_facts(name: str, facts: Mapping[str, Any]) -> None:
    version = facts.get("schema_version")
    if not isinstance(version, int):
        raise ReportError(f"{name}: schema_version is {version!r}, expected an integer")
    if version > SCHEMA_VERSION:
        raise ReportError(
            f"{name}: has schema version {version}, newer than {SCHEMA_VERSION}, the newest that this epic_quant reads"
        )
    if version < SCHEMA_VERSION:
        raise ReportError(f"{name}: made by an older epic_quant (schema version {version}); measure again")
    checkpoint = facts.get("checkpoint")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(key), str) for key in ("source", "kind")):
        raise ReportError(f"{name}: does not say whose weights were measured ('checkpoint' with 'source' and 'kind')")
    try:
        _check_numbers("facts", {name: {**checkpoint, **facts}.get(name) for name in _NUMBERS})
        for key in _NAMES:
            if not _is_text_list(facts.get(key, [])):
                raise TypeError(f"{key} must be a list of names")
        for key in _MAPPINGS:
            if not isinstance(facts.get(key, {}), dict):
                raise TypeError(f"{key} must be an object")
    except TypeError as error:
        raise ReportError(f"{name}: damaged run facts: {error}") from error


def _check_fingerprints(name: str, holders: Iterable[Mapping[str, Any]]) -> None:
    """Raise ReportError where these are of more than one checkpoint; an older epic_quant did not say which."""
    found = dict.fromkeys(str(one[FINGERPRINT]) for one in holders if one.get(FINGERPRINT) is not None)
    if len(found) > 1:
        raise ReportError(
            f"{name}: has records of {len(found)} checkpoints, whose fingerprints are {', '.join(found)}; "
            "expected the records of one run"
        )


def _record(name: str, entry: Mapping[str, Any]) -> Record:
    try:
        record = Record.from_json(entry["extra_info"][JSON_KEY])
        _check_types(record)
        if record.subject in SUBJECTS:
            SUBJECTS[record.subject].from_record(record)
        stats = entry.get("stats")
        if isinstance(stats, dict) and _is_number(stats.get("median")):
            record = replace(record, metrics={**record.metrics, "time_s": stats["median"]})
    except (KeyError, TypeError, ValueError, SpecError) as error:
        raise ReportError(f"{name}: benchmark {entry.get('name')!r} holds a damaged record: {error!r}") from error
    # NaN is what could not be measured too.
    metrics = {
        name: value if value is None or not math.isnan(value) else None for name, value in record.metrics.items()
    }
    return replace(record, metrics=metrics)


def _check_types(record: Record) -> None:
    if not isinstance(record.subject, str) or not all(isinstance(value, str) for value in record.labels.values()):
        raise TypeError("subject and labels must be text")
    for text in (record.subject, *record.labels, *record.labels.values()):
        # JSON can hold half a surrogate pair, which no file can.
        text.encode()
    _check_numbers("metrics", record.metrics)


def _check_numbers(name: str, numbers: Any) -> None:
    if not isinstance(numbers, dict):
        raise TypeError(f"{name} must be numbers by name")
    for key, value in numbers.items():
        if value is not None and not _is_number(value):
            raise TypeError(f"{key} in {name} is {value!r}, expected a number")


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
