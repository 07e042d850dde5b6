"""What a benchmark writes and a report reads. Standard library only, so that a report never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1

# The key of our part of pytest-benchmark's JSON: run facts at the top level, a record in each `extra_info`.
JSON_KEY = "epic_quant"


@dataclass(frozen=True)
class Metric:
    """A quantity that records carry: its unit ("" for a ratio) and which way is better."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    meaning: str


_METRICS = (
    Metric("rel_l2", "", "lower", "‖W - Ŵ‖ / ‖W‖ over all tensors of the class together"),
    Metric("bits_per_weight", "bit", "lower", "stored bits, scales and all other metadata included, a weight"),
    Metric("nbytes", "B", "lower", "bytes really stored"),
    Metric("resident_nbytes", "B", "lower", "bytes that must be in RAM to run the text model"),
    Metric("added_rel_l2", "", "lower", "error of a block's output relative to what the block adds to the stream"),
    Metric("output_rel_l2", "", "lower", "error of a block's or a linear layer's output relative to that output"),
    Metric("time_s", "s", "lower", "median time of the measured call"),
    Metric("bytes_read", "B", "higher", "bytes that the timed call must read at least"),
    Metric("shannon_gap_db", "dB", "lower", "error over Shannon's bound for a Gaussian at the same bits a weight"),
    Metric(
        "lloyd_max_gap_db", "dB", "lower", "error over the best scalar quantizer with as many levels, on a Gaussian"
    ),
    Metric("gaussian_rel_l2", "", "lower", "rel_l2 of the same scheme on Gaussian noise of the same shape"),
    Metric("kurtosis", "", "lower", "fourth moment of the weights over their squared variance; 3 for a Gaussian"),
    Metric("absmax_over_std", "", "lower", "largest magnitude of the weights over their standard deviation"),
    Metric("hit_rate", "", "higher", "lookups of tokens that a row cache answers from RAM, of all lookups"),
    Metric(
        "kl_divergence", "nat", "lower", "KL divergence of the next token's distribution from that of bf16, a token"
    ),
    Metric("p50_s", "s", "lower", "median time of a call, each on rows that are read for the first time"),
    Metric("p99_s", "s", "lower", "time that 99 of 100 such calls stay within"),
    Metric("fetched_nbytes", "B", "lower", "bytes that the system fetched from the disk for them"),
    Metric("anonymous_nbytes", "B", "lower", "memory that it added to the process, as the system tells"),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _METRICS}


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
