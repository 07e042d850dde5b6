"""A policy's predicted divergence, and beside it the measured one, as command lines print them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from epic_quant.records.subjects import QualityRecord
from epic_quant.results.prices import Prediction, Prices, prices_path, read_prices
from epic_quant.results.run import Run
from epic_quant.spec import NOISE_FLOOR, PLESpec, PolicySpec


def prices_of(run: Run, json_path: Path) -> Prices:
    """The prices that lie beside a run's JSON.

    Raises ReportError where there are none, where they cannot be read, and where they are of another checkpoint.
    """
    return read_prices(prices_path(json_path), str(run.facts["checkpoint"].get("fingerprint", "unknown")))


def measured_divergence(run: Run, policy: PolicySpec) -> tuple[float, float | None] | None:
    """KL divergence on the evaluation text in nats a token, and its standard error; None where it was not measured.

    It is that of a policy of the run, under any name, that stores the same; which PLE rows are in RAM changes no value.
    """
    stored = _without_rows(policy)
    for record in run.of(QualityRecord):
        if record.policy != NOISE_FLOOR and _without_rows(record.spec) == stored and record.kl_divergence is not None:
            return record.kl_divergence, record.kl_se
    return None


def predicted_lines(prediction: Prediction) -> Iterator[str]:
    """What is predicted, with and without cross terms."""
    yield (
        f"predicted divergence: {prediction.kl_divergence:.4g} ± {prediction.standard_error:.2g} nats a token, "
        "on the calibration text"
    )
    yield f"without cross terms:  {prediction.alone:.4g}, the sum of what each tensor does alone"


def measured_line(run: Run, policy: PolicySpec, prediction: Prediction) -> str | None:
    """What was measured, and its ratio to what is predicted; None where it was not measured."""
    if (measured := measured_divergence(run, policy)) is None:
        return None
    divergence, error = measured
    beside = "" if error is None else f" ± {error:.2g}"
    predicted = prediction.kl_divergence
    ratio = f", {divergence / predicted:.3g} times the predicted" if predicted > 0 else ""
    return f"measured divergence:  {divergence:.4g}{beside} nats a token, on the evaluation text{ratio}"


def _without_rows(policy: PolicySpec) -> PolicySpec:
    return replace(policy, ple=PLESpec())
