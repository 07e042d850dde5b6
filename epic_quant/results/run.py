"""One run of the benchmarks: its facts and records, and lookups of values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from epic_quant.records import Record, SubjectRecord
from epic_quant.spec import PolicySpec

R = TypeVar("R", bound=SubjectRecord)


@dataclass(frozen=True)
class Run:
    """The facts of a run as its JSON has them, and its records in the order of measuring."""

    facts: Mapping[str, Any]
    records: tuple[Record, ...]

    def of(self, kind: type[R], **labels: object) -> list[R]:
        """The subject's records whose fields have these values; policies in the run's order, all else as measured.

        Raises TypeError, ValueError or SpecError on a damaged record, which a run that was read does not hold.
        """
        if kind not in self._by_kind:
            self._by_kind[kind] = self._read(kind)
        found: list[R] = self._by_kind[kind]
        return [one for one in found if all(getattr(one, name) == value for name, value in labels.items())]

    def one(self, kind: type[R], **labels: object) -> R | None:
        """The first of them; None where there is none."""
        return next(iter(self.of(kind, **labels)), None)

    def value(self, kind: type[SubjectRecord], field: str, **labels: object) -> Any:
        """A field of the first of them; None where there is none."""
        return getattr(self.one(kind, **labels), field, None)

    @cached_property
    def policies(self) -> Mapping[str, PolicySpec]:
        """What the policies of the run store, by name. Raises SpecError on a damaged one."""
        strings = self.facts.get("policy_strings") or {}
        return {name: PolicySpec.parse(text).renamed(name) for name, text in strings.items()}

    @cached_property
    def _by_kind(self) -> dict[type[SubjectRecord], list[Any]]:
        return {}

    def _read(self, kind: type[R]) -> list[R]:
        found = [kind.from_record(record) for record in self.records if record.subject == kind.subject]
        order = {name: place for place, name in enumerate(self.facts.get("policies") or ())}
        return sorted(found, key=lambda one: order.get(getattr(one, "policy", ""), len(order)))


def distinct(values: Any) -> list[Any]:
    """The values in the order in which they first came."""
    return list(dict.fromkeys(values))
