"""A run of a model with three tensor classes, made by hand."""

import json

import pytest

from epic_quant.records import JSON_KEY, SCHEMA_VERSION, Record

# Bytes in bf16; of the table a quarter of the rows is in RAM.
WHOLE = {"full_attention": 32_000, "mlp": 128_000, "ple_table": 64_000}
PARTS = {"full_attention": 32_000, "mlp": 128_000, "ple_rows": 16_000, "norms": 500, "embedding": 10_000}
PARTS |= {"kv_cache": 8_000}
BITS = {"int8-g128": 8.125, "int4-g128": 4.125, "ternary-g128": 1.75}
DIVERGENCES = {
    "full_attention": (0.001, 0.02, 0.9),
    "mlp": (0.0005, 0.01, 0.3),
    "ple_table": (0.0001, 0.002, 0.08),
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]


def entry(record):
    return {"name": "test", "extra_info": {JSON_KEY: record.to_json()}, "stats": {"median": 1.0}}


def sensitivity(tensor_class, spec, divergence, nbytes, whole, text="calibration", **labels):
    metrics = {"kl_divergence": divergence, "kl_se": divergence / 10, "saved_nbytes": whole - nbytes}
    labels = {"tensor_class": tensor_class, "spec": spec, "text": text} | labels
    return Record("sensitivity", labels, metrics, {"nbytes": nbytes})


def stored(whole, spec):
    return round(whole * BITS[spec] / 16)


def make_sensitivities():
    for tensor_class, divergences in DIVERGENCES.items():
        whole = WHOLE[tensor_class]
        for spec, divergence in zip(BITS, divergences, strict=True):
            yield sensitivity(tensor_class, spec, divergence, stored(whole, spec), whole)
            # What is judged must never be what is fitted.
            yield sensitivity(tensor_class, spec, 100.0, stored(whole, spec), whole, text="evaluation")


@pytest.fixture
def data():
    """The JSON object of a run with a footprint and sensitivities, to change before it is written."""
    footprint = Record(
        "footprint",
        {"policy": "bf16", "model": "this checkpoint", "column": "resident"},
        {"nbytes": sum(PARTS.values())},
        {"parts": PARTS},
    )
    return {
        JSON_KEY: {
            "schema_version": SCHEMA_VERSION,
            "checkpoint": {"source": "some model", "kind": "user"},
            "policies": ["bf16"],
            "policy_strings": {"bf16": "kv=bf16,ple=static:5000"},
            "layer_types": LAYER_TYPES,
        },
        "benchmarks": [entry(record) for record in (footprint, *make_sensitivities())],
    }


@pytest.fixture
def write(tmp_path):
    """Writes a JSON object and gives its path."""

    def written(data):
        path = tmp_path / "out.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return path

    return written
