"""A config small enough to reason about: two kv_sources a layer type, one sharer, a window that no block divides."""

import json
from pathlib import Path

import pytest

from epic_quant.gemma4.config import FULL, SLIDING, DenseMLP, GroupedQueryAttention, LayerSpec, Rope, TextConfig

WINDOW = 20


def layer(index, layer_type, kv_source):
    if layer_type == SLIDING:
        attention = GroupedQueryAttention(4, 2, 16, WINDOW, Rope(1e4, 8))
    else:  # Of 32 dims [0:4] and [16:20] rotate.
        attention = GroupedQueryAttention(4, 2, 32, None, Rope(1e4, 4))
    return LayerSpec(index, layer_type, attention, DenseMLP(8), kv_source)


@pytest.fixture(scope="session")
def config():
    """Layers 0 and 1 slide, 2 and 3 are full; 4 shares the K and V of 3."""
    layers = [layer(0, SLIDING, 0), layer(1, SLIDING, 1), layer(2, FULL, 2), layer(3, FULL, 3), layer(4, FULL, 3)]
    return TextConfig(
        vocab_size=10,
        hidden_size=8,
        ple_dim=0,
        ple_vocab_size=0,
        rms_norm_eps=1e-6,
        final_logit_softcapping=None,
        max_position_embeddings=1000,
        bos_token_id=2,
        layers=tuple(layers),
    )


@pytest.fixture(scope="session")
def e4b():
    """E4B's own."""
    facts = Path(__file__).resolve().parents[2] / "benchmarks" / "facts"
    return TextConfig.from_json(json.loads((facts / "gemma-4-E4B.config.json").read_text(encoding="utf-8")))
