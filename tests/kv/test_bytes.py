"""Bytes of K and V by arithmetic of its own, and storage that does not fit a head."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_quant.errors import SpecError
from epic_quant.kv import KVCache, layer_nbytes, nbytes
from epic_quant.spec import FORMATS, NAMED_KV, KVSpec, KVStorageSpec, LayerKVSpec

storages = st.sampled_from(
    [
        *("bf16", "fp32", "int4", "int4-g8", "int3+had16", "int8-g8+had32", "absmax2-b8", "codebook3-b16"),
        *("ternary-b8+had8", "int4+had8+center30", "int2-b8+center9+clip5+unbiased", "affine2-g8+center1"),
        *("int2+had8+center9+pca3-int4+unbiased", "ternary-b8+center8+pca2-absmax3-packed+clip5"),
    ]
).map(KVStorageSpec.parse)
heads = st.tuples(storages) | st.tuples(storages, storages)
full_layers = st.builds(LayerKVSpec, heads, heads, st.integers(0, 30), st.integers(0, 9))
sliding_layers = st.builds(LayerKVSpec, heads, heads, st.integers(0, 30))


def test_directions_that_do_not_fit_the_head_are_named(config):
    with pytest.raises(SpecError, match="8 dims of layer 2's heads: 8 directions leave nothing of 8 dims"):
        KVCache(config, KVSpec.parse("full.k.rotated=int4+center8+pca8-int8"))


@pytest.mark.parametrize(
    ("text", "dims", "layer"), [("int4-g12", 16, 0), ("full.k.unrotated=int4-g16", 24, 2), ("full.v=int8-g20", 32, 2)]
)
def test_a_group_that_does_not_fit_the_head_is_named(config, text, dims, layer):
    policy = KVSpec.parse(text)
    for use in (lambda: KVCache(config, policy), lambda: nbytes(policy, config, 5)):
        with pytest.raises(SpecError, match=rf"does not fit the {dims} dims of layer {layer}'s heads: a group of"):
            use()


@settings(max_examples=40)
@given(st.integers(0, 70), st.builds(KVSpec, full_layers, sliding_layers))
def test_bytes_by_count_are_those_of_a_cache(config, tokens, policy):
    cache = KVCache(config, policy, torch.bfloat16)
    for spec in config.layers[:4]:
        k = torch.ones(2, max(1, tokens), spec.attention.head_dim, dtype=torch.bfloat16)
        if tokens:
            cache.append(spec.index, k[None], k[None])
        assert cache.layer_nbytes(spec.index) == layer_nbytes(policy, spec, tokens)
    assert cache.nbytes == nbytes(policy, config, tokens)


def full_layer(config):
    return next(spec for spec in config.layers if spec.attention.sliding_window is None)


@pytest.mark.parametrize(
    ("name", "a_token"),
    [
        ("bf16", 4 * 512 * 2),
        ("int8", 4 * (512 + 2)),
        ("int4", 4 * (256 + 2)),
        ("int4+had", 4 * (256 + 2)),
        ("original", 4 * (128 // 2 + 384 // 4 + 2 * 2)),
        ("original+ls", 4 * (128 // 2 + 384 // 4 + 2 * 2)),
    ],
)
def test_bytes_of_e4b_by_hand(e4b, name, a_token):
    """Two heads of K and two of V on a full layer, and a scale of two bytes for each set of dims."""
    assert layer_nbytes(NAMED_KV[name], full_layer(e4b), 8191) == 8191 * a_token


def test_bytes_of_blocks_by_hand(e4b):
    """K of 8191 tokens is 127 blocks of 64, each with 1024 channels, and 63 tokens in two bytes a value."""
    blocks = 127 * 1024 * (64 // 2 + 2) + 63 * 1024 * 2
    assert layer_nbytes(NAMED_KV["per-channel-k"], full_layer(e4b), 8191) == blocks + 8191 * 2 * (256 + 2)
    window = 8 * 512 * (64 // 2 + 2) + 63 * 512 * 2 + 512 * 2 * (128 + 2)
    assert layer_nbytes(NAMED_KV["per-channel-k"], e4b.layers[0], 8191) == window


def asked_bits(policy):
    """The mean bits of a value on E4B's full layers, by the formats: 128 of 512 dims are rotated."""
    plain = {"bf16": 16.0, "fp32": 32.0}
    asked = []
    for head in (policy.full.k, policy.full.v):
        each = [plain.get(storage.format) or math.log2(FORMATS[storage.format].num_levels) for storage in head]
        asked.append(each[0] if len(each) == 1 else each[0] / 4 + each[1] * 3 / 4)
    return sum(asked) / 2


@pytest.mark.parametrize("name", [name for name, policy in NAMED_KV.items() if asked_bits(policy) >= 4])
def test_four_bits_and_more_cost_at_most_a_tenth_beside(e4b, name):
    """Scales and the unquantized tail included, on E4B's full layers at 8191 tokens."""
    policy, spec = NAMED_KV[name], full_layer(e4b)
    stored = 8 * layer_nbytes(policy, spec, 8191) / (8191 * 2 * 2 * 512)
    assert asked_bits(policy) <= stored <= 1.1 * asked_bits(policy)


def test_the_searched_policies_keep_to_their_bytes(e4b):
    """`p-rope` stores no more than the original on full layers, `p-rope-4` at most 4.25 bits a value."""
    spec = full_layer(e4b)
    for tokens in (8191, 32768):
        values = tokens * 2 * 2 * 512
        assert layer_nbytes(NAMED_KV["p-rope"], spec, tokens) <= layer_nbytes(NAMED_KV["original"], spec, tokens)
        assert 8 * layer_nbytes(NAMED_KV["p-rope-4"], spec, tokens) <= 4.25 * values
        assert layer_nbytes(NAMED_KV["original-inverted"], spec, tokens) == layer_nbytes(
            NAMED_KV["original"], spec, tokens
        )


def test_the_inverted_policy_has_more_bits_on_the_unrotated_dims():
    rotated, unrotated = (FORMATS[storage.format].num_levels for storage in NAMED_KV["original-inverted"].full.k)
    assert rotated < unrotated
    assert asked_bits(NAMED_KV["original-inverted"]) == asked_bits(NAMED_KV["original"]) == 2.5
