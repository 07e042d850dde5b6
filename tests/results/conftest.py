"""A small run, made by hand."""

import json

import pytest

from epic_quant.records import JSON_KEY, SCHEMA_VERSION, Record

FACTS = {
    "schema_version": SCHEMA_VERSION,
    "checkpoint": {"source": "benchmarks/mini_gemma4", "fingerprint": "0123abcd", "kind": "trained-small"},
    "policies": ["bf16", "int4-g128"],
    "policy_strings": {"int4-g128": "mlp=int4-g128"},
    "versions": {"python": "3.12.1", "torch": "2.9.0"},
    "cpu": "a processor",
    "threads": 2,
    "platform": "Linux x86_64",
    "read_bandwidth_gbs": 20.0,
}


def _footprint():
    for policy, nbytes in (("bf16", 40_000_000), ("int4-g128", 12_000_000)):
        labels = {"policy": policy, "model": "this checkpoint", "column": "resident"}
        yield Record("footprint", labels, {"nbytes": nbytes}, {"parts": {"mlp": nbytes}}), None


def _ladder():
    for tensor_class, error in (("mlp", 0.09), ("embedding", 0.08)):
        yield Record("ladder", {"spec": "int4", "tensor_class": tensor_class}, {"rel_l2": error, "kurtosis": 3.0}), 1e-3


def _block():
    for layer_type in ("sliding_attention", "full_attention"):
        for policy, error, median in (("fp32", 0.0, 0.004), ("bf16", 0.002, 0.002), ("int4-g128", 0.1, 0.001)):
            labels = {"policy": policy, "layer_type": layer_type, "tokens": "1"}
            yield Record("block", labels, {"added_rel_l2": error, "nbytes": 5_000_000}), median


def _quality():
    for policy, divergence in (("bf16", 0.0), ("int4-g128", 0.02)):
        metrics = {"kl_divergence": divergence, "top1_agreement": 1 - divergence}
        yield Record("quality", {"policy": policy}, metrics, {"spec": "mlp=int4-g128"}), 1.0


def _weights():
    for tensor_class, error in (("mlp", 0.1), ("sliding_attention", 0.08)):
        labels = {"policy": "int4-g128", "tensor_class": tensor_class, "spec": "int4-g128", "op": "quantize"}
        yield Record("weights", labels, {"rel_l2": error, "bits_per_weight": 4.125, "nbytes": 1000}), 0.02


SUBJECTS = {"footprint": _footprint, "weights": _weights, "ladder": _ladder, "block": _block, "quality": _quality}


@pytest.fixture
def run_json():
    """`run_json("block", …)`: a whole JSON object with the records of these subjects, of all where none is named."""

    def make(*subjects):
        entries = [{"name": "of another plugin", "extra_info": {}, "stats": {"median": 1.0}}]
        for subject in subjects or SUBJECTS:
            for record, median in SUBJECTS[subject]():
                entry = {"name": f"test_{subject}", "extra_info": {JSON_KEY: record.to_json()}}
                entries.append(entry if median is None else entry | {"stats": {"median": median}})
        return {JSON_KEY: json.loads(json.dumps(FACTS)), "benchmarks": entries}

    return make


@pytest.fixture
def write_json(tmp_path):
    """Writes an object as JSON, or text as it is, and gives the path."""

    def write(data, name="out.json"):
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return path

    return write
