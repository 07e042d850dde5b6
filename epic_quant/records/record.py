"""A record: one measurement as JSON has it, and as a dataclass of its subject."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, Union, dataclass_transform, get_args, get_origin, get_type_hints

from epic_quant.records.metrics import METRICS

# Version 2: policies are written in the grammar of `epic_quant.spec`, and each subject by its dataclass.
SCHEMA_VERSION = 2

# The key of our part of pytest-benchmark's JSON: run facts at the top level, a record in each `extra_info`.
JSON_KEY = "epic_quant"

# The key of the checkpoint's fingerprint, in the facts' `checkpoint` and beside each record in the JSON.
FINGERPRINT = "fingerprint"

_SEPARATOR = ", "  # between the values of a label that has several


@dataclass(frozen=True)
class Record:
    """One measurement: what was measured (`subject`, `labels`) and what came out (`metrics`, `details`).

    `metrics` has only names of `METRICS`; None stands for what could not be measured and prints as —.
    `details` holds what only one section of the report reads, such as an error for each tensor.
    """

    subject: str
    labels: Mapping[str, str]
    metrics: Mapping[str, float | None]
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        strange = set(self.metrics) - set(METRICS)
        if strange:
            raise ValueError(f"metrics that the table does not know: {sorted(strange)}")

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return {
            "subject": self.subject,
            "labels": dict(self.labels),
            "metrics": dict(self.metrics),
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """The inverse of `to_json`; raises KeyError or TypeError on what is no record."""
        return cls(data["subject"], dict(data["labels"]), dict(data["metrics"]), dict(data["details"]))


def label(key: str | None = None, *, default: Any = dataclasses.MISSING) -> Any:
    """A field that names what was measured; `key` is its name in the record, by default the field's own."""
    return field(default=default, metadata={"part": "labels", "key": key})


def metric(*, default: Any = dataclasses.MISSING) -> Any:
    """A field of `METRICS`; None is what could not be measured, or with None as default what the record has not."""
    return field(default=default, metadata={"part": "metrics", "key": None})


def detail(*, default: Any = dataclasses.MISSING, default_factory: Any = dataclasses.MISSING) -> Any:
    """A field that only the section of its subject reads."""
    metadata = {"part": "details", "key": None}
    if default_factory is not dataclasses.MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(label, metric, detail))
@dataclass(frozen=True, kw_only=True)
class SubjectRecord:
    """The base of every subject's dataclass, whose fields are made by `label`, `metric` and `detail`.

    A field may be text, a number, an enum, a value with `parse` (a spec), or a tuple or mapping of these.
    """

    subject: ClassVar[str]
    time_s: float | None = metric(default=None)

    def __init_subclass__(cls, *, subject: str) -> None:
        cls.subject = subject
        dataclass(frozen=True, kw_only=True)(cls)

    def to_record(self) -> Record:
        """The record as JSON has it; `from_record` is the inverse."""
        parts: dict[str, dict[str, Any]] = {"labels": {}, "metrics": {}, "details": {}}
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if value is None and one.default is None:
                continue
            part = one.metadata["part"]
            parts[part][_key(one)] = _label_text(value) if part == "labels" else _plain(value)
        return Record(self.subject, **parts)

    @classmethod
    def from_record(cls, record: Record) -> Self:
        """Raises TypeError, ValueError or SpecError where the record is not of this subject or is damaged."""
        if record.subject != cls.subject:
            raise ValueError(f"a record of {record.subject!r} is none of {cls.subject!r}")
        parts = {name: dict(getattr(record, name)) for name in ("labels", "metrics", "details")}
        values, types = {}, get_type_hints(cls)
        for one in dataclasses.fields(cls):
            part, key = one.metadata["part"], _key(one)
            if key in parts[part]:
                value = parts[part].pop(key)
                value = _label_value(types[one.name], value, key) if part == "labels" else value
                values[one.name] = _decoded(types[one.name], value, key)
            elif part == "metrics":
                values[one.name] = None
            elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
                raise ValueError(f"lacks {key!r} among its {part}")
        strange = [f"{key!r} among its {name}" for name, rest in parts.items() for key in rest]
        if strange:
            raise ValueError(f"unknown {strange[0]}")
        return cls(**values)

    @property
    def labels(self) -> dict[str, str]:
        """What was measured, as text."""
        return dict(self.to_record().labels)

    @classmethod
    def median(cls, records: Sequence[Self]) -> Self:
        """Records of the same labels as one, with the median of each metric; the details are the first one's."""
        if len(records) == 1:
            return records[0]
        medians = {name: _median(getattr(record, name) for record in records) for name in cls.metric_names()}
        return replace(records[0], **medians)

    @classmethod
    def metric_names(cls) -> list[str]:
        """The fields that are metrics."""
        return [one.name for one in dataclasses.fields(cls) if one.metadata["part"] == "metrics"]


def _median(values: Iterator[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def _key(one: dataclasses.Field[Any]) -> str:
    return one.metadata["key"] or one.name


def _label_text(value: Any) -> str:
    return _SEPARATOR.join(map(str, value)) if isinstance(value, tuple) else str(value)


def _label_value(kind: Any, text: str, key: str) -> Any:
    """A label's text as JSON would have the value of this type."""
    if get_origin(kind) is tuple:
        return text.split(_SEPARATOR)
    if kind is int or int in get_args(kind):
        if not (text.isascii() and text.isdecimal()):
            raise ValueError(f"{key} is {text!r}, expected a number")
        return int(text)
    return text


def _plain(value: Any) -> Any:
    """A field's value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if hasattr(value, "parse") else value


def _decoded(kind: Any, value: Any, key: str) -> Any:
    """The inverse of `_plain` for a field of this type."""
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _decoded(next(one for one in arguments if one is not NoneType), value, key)
    if origin is tuple:
        return tuple(_decoded(arguments[0], item, key) for item in _checked(list, value, key))
    if origin is Mapping:
        return {name: _decoded(arguments[1], item, key) for name, item in _checked(dict, value, key).items()}
    if hasattr(kind, "parse"):
        return kind.parse(_checked(str, value, key))
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and not math.isfinite(value)):
            raise TypeError(f"{key} is {value!r}, expected a number")
        return int(value) if kind is int else value
    return kind(value) if issubclass(kind, Enum) else _checked(kind, value, key)


def _checked(kind: type, value: Any, key: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{key} is {value!r}, expected {kind.__name__}")
    return value
