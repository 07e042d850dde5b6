"""What each tensor class alone does to the divergence, and what that predicts for a policy.

A policy's predicted divergence is the sum of those that each of its classes causes alone. KL divergence is quadratic in
a small error of the logits, and where the errors of two classes are unrelated their cross term averages out, so the
sum holds while every part is small. It fails where one class alone already leaves little of the distribution, or where
errors build on each other: so whoever prints a prediction prints the measured divergence beside it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from epic_quant.errors import ReportError
from epic_quant.records import Record
from epic_quant.results.run import Run
from epic_quant.spec.layers import parse_layers

UNQUANTIZED = "bf16"
# The K and V stores are chosen like a class, and named `kv` in a policy string.
KV_CACHE = "kv_cache"

# What is fitted reads the one, what is judged the other.
CALIBRATION, EVALUATION = "calibration", "evaluation"

MAKE_SENSITIVITIES = "pytest benchmarks/test_quality.py --benchmark-json out.json"


@dataclass(frozen=True)
class Sensitivity:
    """One class, or its part in one layer, under `spec` with all else in bf16.

    `nbytes` are those of the class, or part, under the spec, and `whole_nbytes` in bf16; None where unknown.
    """

    tensor_class: str
    layer: int | None
    spec: str
    kl_divergence: float
    nbytes: int | None
    whole_nbytes: int | None


def sensitivities(run: Run, text: str) -> list[Sensitivity]:
    """The run's sensitivities on that text (`calibration` or `evaluation`), the median where several are the same.

    Raises ReportError on a record that lacks a label or whose layer is no number.
    """
    found: dict[tuple[str, int | None, str], list[Record]] = defaultdict(list)
    for record in run.select("sensitivity", text=text):
        if record.metrics.get("kl_divergence") is not None:
            found[_key(record)].append(record)
    return [_sensitivity(*key, records) for key, records in found.items()]


def class_specs(policy: str) -> dict[str, str]:
    """What a policy string stores otherwise than in bf16, by class: `mlp=int4,kv=int8,ple=all` has two.

    Layers of their own are a class each (`mlp@0-5`), and there bf16 is said too. Which PLE rows are in RAM changes no
    value, so `ple` is not among them.
    """
    parts = (part.partition("=") for part in policy.split(","))
    return {
        KV_CACHE if key == "kv" else key: spec
        for key, equals, spec in parts
        if equals and key != "ple" and (spec != UNQUANTIZED or "@" in key)
    }


def predicted_divergence(run: Run, policy: str, text: str = CALIBRATION) -> float | None:
    """The sum over a policy string's classes, in nats a token; None where one of them was not measured alone.

    Of a class some of whose layers have a spec of their own, the sum is over its layers.
    """
    found = {(one.tensor_class, one.layer, one.spec): one.kl_divergence for one in sensitivities(run, text)}
    said, own = {}, defaultdict[str, dict[int, str]](dict)
    for key, spec in class_specs(policy).items():
        tensor_class, at, layers = key.partition("@")
        if at:
            own[tensor_class] |= dict.fromkeys(parse_layers(layers), spec)
        else:
            said[tensor_class] = spec
    units: list[tuple[str, int | None, str]] = [(key, None, spec) for key, spec in said.items() if key not in own]
    for tensor_class, specs in own.items():
        layers_measured = {layer for key, layer, _ in found if key == tensor_class and layer is not None}
        units += [
            (tensor_class, layer, specs.get(layer, said.get(tensor_class, UNQUANTIZED)))
            for layer in sorted(layers_measured | specs.keys())
        ]
    parts = [found.get(unit) for unit in units if unit[2] != UNQUANTIZED]
    return None if None in parts else sum(part for part in parts if part is not None)


def class_divergences(run: Run, text: str) -> Mapping[tuple[str, str], float]:
    """KL divergence by class and spec, over all layers of the class together."""
    return {(one.tensor_class, one.spec): one.kl_divergence for one in sensitivities(run, text) if one.layer is None}


def _key(record: Record) -> tuple[str, int | None, str]:
    labels = record.labels
    try:
        layer = labels.get("layer")
        return labels["tensor_class"], None if layer is None else int(layer), labels["spec"]
    except (KeyError, ValueError) as error:
        raise ReportError(f"a 'sensitivity' record has no class, spec or number of a layer: {dict(labels)}") from error


def _sensitivity(tensor_class: str, layer: int | None, spec: str, records: list[Record]) -> Sensitivity:
    divergences = [value for record in records if (value := record.metrics["kl_divergence"]) is not None]
    details, saved = records[0].details, records[0].metrics.get("saved_nbytes")
    nbytes = details.get("nbytes")
    whole = None if nbytes is None or saved is None else round(nbytes + saved)
    # A KV policy goes by a name, and in policy strings by what the name stands for.
    said = details.get("spec")
    return Sensitivity(
        tensor_class,
        layer,
        said if isinstance(said, str) else spec,
        statistics.median(divergences),
        None if nbytes is None else round(nbytes),
        whole,
    )
