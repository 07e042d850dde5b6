"""Stored bytes of every named KV policy: a change here makes a cache that was stored before unreadable."""

import hashlib

import pytest
import torch

from epic_quant import kernels
from epic_quant.gemma4.config import FULL, SLIDING
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
}


def integers(layer, tokens):
    """K and V [1, num_kv_heads, tokens, head_dim]: multiples of 1/64, made by integers alone."""
    shape = (2, layer.attention.num_kv_heads, tokens, layer.attention.head_dim)
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    mixed = numbers * 2654435761 % 2**32
    k, v = ((mixed ^ (mixed >> 15)) % 4001 - 2000) / 64
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


def has_directions(spec):
    return "pca" in str(spec)


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("name", NAMED_KV)
def test_what_is_stored_never_changes(e4b, name, isa, monkeypatch):
    """With principal directions it hangs on LAPACK's rounding: on one machine every backend stores the same."""
    monkeypatch.setattr(kernels, "isa", lambda: isa)
    found = stored(e4b, NAMED_KV[name])
    if has_directions(NAMED_KV[name]):
        monkeypatch.setattr(kernels, "isa", lambda: kernels.REFERENCE)
        assert found == stored(e4b, NAMED_KV[name])
    else:
        assert found == GOLDEN[name]


def test_every_named_policy_is_pinned():
    assert set(GOLDEN) == {name for name, spec in NAMED_KV.items() if not has_directions(spec)}
