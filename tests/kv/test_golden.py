"""Stored bytes of every named KV policy: a change here makes a cache that was stored before unreadable."""

import hashlib

import pytest
import torch

from epic_quant import kernels
from epic_quant.gemma4.config import FULL, SLIDING
from epic_quant.kv import directions
from epic_quant.kv.layer import LayerStore
from epic_quant.spec import NAMED_KV

TOKENS = 700

# SHA-256, its first 16 digits, of all that a sliding and a full layer of E4B store of the tokens below.
GOLDEN = {
    "bf16": "6f0750d6f5eadc89",
    "fp32": "ed8c582a06bf7a29",
    "int8": "b6d2dc1d469473bb",
    "int4": "d7d51e72634bac29",
    "int4+had": "0b454f0fd79a8ac7",
    "per-channel-k": "070bb6ba2fd19c8a",
    "original": "295a2f3b4fa3b5f0",
    "original+ls": "e3e1a0dd141efd35",
    "original-inverted": "4951ce5ebc67fd9b",
    "p-rope": "62a3d1086148ef5c",
    "p-rope-4": "cdf16293aba8a23b",
}


def mixed(shape):
    """Integers that look random, made by integers alone."""
    numbers = torch.arange(torch.Size(shape).numel()).view(shape) * 2654435761 % 2**32
    return numbers ^ (numbers >> 15)


def integers(layer, tokens):
    """K and V [1, num_kv_heads, tokens, head_dim]: multiples of 1/64."""
    shape = (2, layer.attention.num_kv_heads, tokens, layer.attention.head_dim)
    k, v = (mixed(shape) % 4001 - 2000) / 64
    return k[None], v[None]


def stored(config, spec):
    """The bytes that the first source layer of each type stores, tensor after tensor."""
    digest = hashlib.sha256()
    for layer_type in (SLIDING, FULL):
        layer = next(one for one in config.layers if one.layer_type == layer_type)
        store = LayerStore(layer, spec.of(layer_type), torch.bfloat16)
        store.append(*integers(layer, TOKENS))
        for segment in store._segments:
            for rows in segment._rows():
                digest.update(rows.rows().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def reflectors(tokens, directions, dtype):
    """Some of integers in place of those of the tokens, which hang on how LAPACK rounds."""
    shape = (tokens.shape[1], directions, tokens.shape[2])
    return (mixed(shape) % 17 - 8).to(dtype) / 8


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("name", NAMED_KV)
def test_what_is_stored_never_changes(e4b, name, isa, monkeypatch):
    monkeypatch.setattr(kernels, "isa", lambda: isa)
    monkeypatch.setattr(directions, "reflectors", reflectors)
    assert stored(e4b, NAMED_KV[name]) == GOLDEN[name]


def test_every_named_policy_is_pinned():
    assert set(GOLDEN) == set(NAMED_KV)
