"""Bytes against what is really stored, and against the published table."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epic_quant import footprint, kv, quantize
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.policy import PolicyWeights
from epic_quant.spec import NAMED, NAMED_KV, PolicySpec, WeightSpec

FACTS = Path(__file__).resolve().parent.parent / "benchmarks" / "facts"


# Attention, MLP, PLE projections, hot PLE rows, total: MB, as the original published them.
PUBLISHED = {
    "original-1.58": (207.0, 1653.4, 27.8, 107.5, 1995.7),
    "original-3": (321.6, 1653.4, 27.8, 107.5, 2110.4),
    "original-4": (321.6, 1653.4, 27.8, 107.5, 2110.4),
    "bf16": (1284.5, 6606.0, 110.1, 107.5, 8108.2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_originals_rows_come_out_to_the_published_digit(name, e4b):
    parts = footprint.as_published(NAMED[name], e4b)
    measured = [parts["attention"], parts["mlp"], parts["ple_projections"], parts["ple_hot"], sum(parts.values())]
    assert tuple(round(nbytes / 1e6, 1) for nbytes in measured) == PUBLISHED[name]


def test_three_bits_really_packed_are_fewer_than_the_original_stored(e4b):
    packed, stored = (footprint.as_published(NAMED[name], e4b) for name in ("original-3-packed", "original-3"))
    # Sliding layers alone are at 3 bits: of their 458.8 M weights one bit each is saved.
    assert stored["attention"] - packed["attention"] == 35 * (2048 + 1024 + 2048) * 2560 // 8


def test_resident_bytes_of_bf16_are_the_files_own(e4b):
    header = json.loads((FACTS / "gemma-4-E4B.tensors.json").read_text(encoding="utf-8"))
    text = {name: shape for name, shape in header["shapes"].items() if ".language_model." in name}
    elements = 0
    for shape in text.values():
        count = 1
        for size in shape:
            count *= size
        elements += count
    parts = footprint.resident(PolicySpec.parse("ple=all"), e4b, 1)
    weights = sum(nbytes for part, nbytes in parts.items() if part != "kv_cache")
    assert weights + footprint.unused_nbytes(e4b) == 2 * elements
    assert footprint.unused_nbytes(e4b) == 110_111_232


@given(tokens=st.integers(1, 200_000))
def test_kv_bytes_are_those_of_the_kv_sources_up_to_their_window(tokens):
    config = TextConfig.from_json(json.loads((FACTS / "gemma-4-E4B.config.json").read_text(encoding="utf-8")))
    expected = 16_384 * tokens + 40_960 * min(tokens, 512)
    assert kv.nbytes(NAMED_KV["bf16"], config, tokens) == expected
    assert kv.nbytes(NAMED_KV["fp32"], config, tokens) == 2 * expected
    assert footprint.kv_nbytes(PolicySpec.parse("kv=fp32"), config, tokens) == 2 * expected
    assert footprint.kv_nbytes(PolicySpec.parse("kv@0-41=fp32"), config, tokens) == 2 * expected


@pytest.mark.parametrize("name", ["original-1.58", "original-3-packed", "int3-g128"])
def test_footprint_is_what_quantizing_the_whole_checkpoint_stores(name, toy_checkpoint):
    policy = NAMED[name]
    weights = PolicyWeights(toy_checkpoint, policy)
    layers = [weight for layer in weights.config.layers for weight in weights.layer(layer.index).values()]
    stored = sum(weight.nbytes for weight in layers)
    parts = footprint.resident(policy, weights.config, 1)
    assert stored == sum(
        parts[part] for part in ("sliding_attention", "full_attention", "mlp", "ple_projections")
    ) + sum(weight.nbytes for weight in layers if isinstance(weight, torch.Tensor))


def test_ple_rows_are_bounded_by_the_table(toy_checkpoint):
    config = CheckpointWeights(toy_checkpoint).config
    whole = config.ple_vocab_size * config.num_layers * config.ple_dim * 2
    assert footprint.resident(PolicySpec.parse("ple=lru:1000000"), config, 1)["ple_rows"] == whole
    row = config.num_layers * config.ple_dim
    some = footprint.resident(PolicySpec.parse("ple_table=int4,ple=lru:3"), config, 1)["ple_rows"]
    assert some == 3 * (row // 2 + 2)
    rows = CheckpointWeights(toy_checkpoint).rows("embed_tokens_per_layer.weight", torch.arange(3))
    assert quantize(rows, WeightSpec("int4")).nbytes == some
