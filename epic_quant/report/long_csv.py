"""All records as one tidy table: a line for each metric of each record, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io

from epic_quant.records import METRICS
from epic_quant.results.run import Run


def render(run: Run) -> str:
    """CSV (RFC 4180, but for plain line breaks) with a header: subject, every label, metric, value, unit, better.

    Values are in full precision, in the unit that stands beside them; what was not measured is empty, as are labels
    that a record does not bear.
    """
    labels = list(dict.fromkeys(label for record in run.records for label in record.labels))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["subject", *labels, "metric", "value", "unit", "better"])
    for record in run.records:
        for name, value in record.metrics.items():
            metric = METRICS[name]
            label_values = [record.labels.get(label, "") for label in labels]
            number = "" if value is None else repr(value)
            writer.writerow([record.subject, *label_values, name, number, metric.unit, metric.better])
    return text.getvalue()
