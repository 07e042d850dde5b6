"""A run of a model with three layers and its prices, made by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from epic_quant.records import JSON_KEY, SCHEMA_VERSION, Record
from epic_quant.results.prices import Priced, Prices, prices_path, write_prices
from epic_quant.spec import KINDS, KVSpec, Target, TensorClass

FINGERPRINT = "0123456789abcdef"
LAYER_CLASSES = [TensorClass.SLIDING_ATTENTION, TensorClass.FULL_ATTENTION, TensorClass.SLIDING_ATTENTION]
BITS = {"int8-g128": 8.125, "int4-g128": 4.125, "ternary-g128": 1.75}
KV_SPECS = {"int8": 8.25, "int4": 4.25}
TOKENS, WINDOWS = 256, 4

NUMEL = {
    Target(attention, kind, layer): numel
    for layer, attention in enumerate(LAYER_CLASSES)
    for tensor_class, numel in ((attention, 1024), (TensorClass.MLP, 4096), (TensorClass.PLE_PROJECTIONS, 512))
    for attention in [tensor_class]
    for kind in KINDS[tensor_class]
}
NUMEL |= {Target(TensorClass.PLE_TABLE): 32_768, Target(TensorClass.EMBEDDING): 16_384}

# Resident bytes in bf16; of the PLE table a quarter of the rows is in RAM.
PARTS = {"norms": 500, "ple_rows": 2 * NUMEL[Target(TensorClass.PLE_TABLE)] // 4, "kv_cache": 24_000}
for _target, _numel in NUMEL.items():
    if _target.tensor_class is not TensorClass.PLE_TABLE:
        PARTS[_target.tensor_class.value] = PARTS.get(_target.tensor_class.value, 0) + 2 * _numel


def make_prices(seed=0, bits=BITS, numel=NUMEL, common=0.3):
    """Prices whose derivatives grow as bits fall, and have something in common between tensors."""
    rng = np.random.default_rng(seed)
    shared = common * rng.normal(size=TOKENS)

    def priced(name, target, layer, count, specs, weights):
        scales = np.sqrt(count) * np.exp2(-np.array(list(specs.values()))) * np.exp(rng.normal()) / 100
        derivatives = (rng.normal(size=(len(specs), TOKENS)) + shared) * scales[:, None]
        nbytes = tuple(round(count * width / 8) for width in specs.values())
        return Priced(name, target, layer, weights, tuple(specs), nbytes, derivatives.astype(np.float32))

    tensors = tuple(
        priced(".".join(map(str, target)), target, target.layer, count, bits, count) for target, count in numel.items()
    )
    kv = tuple(
        priced(f"kv.{layer}", None, layer, 4000, {str(KVSpec.parse(key)): w for key, w in KV_SPECS.items()}, 0)
        for layer in range(len(LAYER_CLASSES))
    )
    return Prices(tensors, kv, TOKENS - WINDOWS, {"checkpoint": FINGERPRINT})


def quality_entry(name, policy, divergence, error=None):
    """What the JSON holds of a policy that was measured."""
    metrics = {"kl_divergence": divergence, "kl_se": error}
    return _entry(Record("quality", {"policy": name}, metrics, {"spec": str(policy)}))


def _entry(record):
    return {"name": "test", "extra_info": {JSON_KEY: record.to_json()}, "stats": {"median": 1.0}}


@pytest.fixture
def prices():
    return make_prices()


@pytest.fixture
def data():
    """The JSON object of a run with a footprint, to change before it is written."""
    labels = {"policy": "bf16", "model": "this checkpoint", "column": "resident"}
    footprint = Record("footprint", labels, {"nbytes": sum(PARTS.values())}, {"parts": PARTS})
    return {
        JSON_KEY: {
            "schema_version": SCHEMA_VERSION,
            "checkpoint": {"source": "some model", "kind": "user", "fingerprint": FINGERPRINT},
            "policies": ["bf16"],
            "policy_strings": {"bf16": "kv=bf16,ple=static:5000"},
        },
        "benchmarks": [_entry(footprint)],
    }


@pytest.fixture
def write(tmp_path, prices):
    """Writes a JSON object with prices beside it, and gives its path."""

    def written(data, prices=prices) -> Path:
        path = tmp_path / "out.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        if prices is not None:
            write_prices(prices, prices_path(path))
        return path

    return written
