"""Records, which benchmarks write and reports read: `subjects` has a dataclass for each subject. Without torch."""

from epic_quant.records.metrics import METRICS, Metric
from epic_quant.records.record import FINGERPRINT, JSON_KEY, SCHEMA_VERSION, Record, SubjectRecord

__all__ = ["FINGERPRINT", "JSON_KEY", "METRICS", "SCHEMA_VERSION", "Metric", "Record", "SubjectRecord"]
