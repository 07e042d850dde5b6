"""One run of the benchmarks: its facts and its records, and how sections look values up."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epic_quant.records import Record


@dataclass(frozen=True)
class Run:
    """The facts of a run as its JSON has them, and its records in the order of measuring."""

    facts: Mapping[str, Any]
    records: tuple[Record, ...]

    def select(self, subject: str, /, **labels: str) -> list[Record]:
        """The subject's records that bear all these labels."""
        return [
            record for record in self.records if record.subject == subject and labels.items() <= record.labels.items()
        ]

    def labels(self, subject: str, label: str, /, **labels: str) -> list[str]:
        """The distinct values of a label among those records: policies in the run's order, others as they came."""
        found = dict.fromkeys(record.labels[label] for record in self.select(subject, **labels))
        if label != "policy":
            return list(found)
        first = [name for name in self.facts.get("policies") or () if name in found]
        return list(dict.fromkeys([*first, *found]))

    def policy_string(self, name: str) -> str:
        """What a policy of this run stores: as its records say, or the run's facts; else its name."""
        for record in self.select("quality", policy=name):
            if "policy" in record.details:
                return str(record.details["policy"])
        return str((self.facts.get("policy_strings") or {}).get(name, name))

    def value(self, subject: str, metric: str, /, **labels: str) -> float | None:
        """The metric of those records, their median where several measured the same; None where none did."""
        values = [record.metrics.get(metric) for record in self.select(subject, **labels)]
        present = [value for value in values if value is not None]
        return statistics.median(present) if present else None
