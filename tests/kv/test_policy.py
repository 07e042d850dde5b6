"""The spec strings, the named table, and bytes by arithmetic of its own."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_quant.errors import SpecError
from epic_quant.kv import NAMED, KVCache, KVPolicy, LayerPolicy, Storage
from epic_quant.kv.storage import Pca
from epic_quant.quant import SCHEMES, quantizer

storages = st.sampled_from(
    [
        *("bf16", "fp32", "int4", "int4-g8", "int3+had16", "int8-g8+had32", "absmax2@8", "codebook3@16"),
        *("ternary+had8@8", "int4+had8+center30", "int2+center9+clip5+unbiased@8", "affine2-g8+center1"),
        *("int2+had8+center9+pca3-int4+unbiased", "ternary+center8+pca2-absmax3-packed+clip5@8"),
    ]
).map(Storage.parse)
heads = st.tuples(storages) | st.tuples(storages, storages)
full_layers = st.builds(LayerPolicy, heads, heads, st.integers(0, 30), st.integers(0, 9))
sliding_layers = st.builds(LayerPolicy, heads, heads, st.integers(0, 30))


@given(st.builds(KVPolicy, full_layers, sliding_layers))
def test_parse_and_str_are_inverses(policy):
    assert KVPolicy.parse(str(policy)) == policy
    assert "," not in str(policy)
    assert policy.name == str(policy)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_policy_reads_back_by_name_and_by_string(name):
    assert KVPolicy.parse(name) is NAMED[name]
    assert NAMED[name].name == name
    assert KVPolicy.parse(str(NAMED[name])) == NAMED[name]
    assert hash(KVPolicy.parse(str(NAMED[name]))) == hash(NAMED[name])


def test_nothing_said_is_bf16():
    assert KVPolicy() == NAMED["bf16"] == KVPolicy.parse("sliding.k=bf16")
    assert str(KVPolicy()) == "bf16"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("k=int4/v=int4", "int4"),
        ("int8/k=int4/full.k=int3", "v=int8/sliding.k=int4/full.k=int3"),
        ("full.k=int4/full.k.rotated=int8", "full.k.rotated=int8/full.k.unrotated=int4"),
        ("full.k.rotated=int8", "full.k.rotated=int8/full.k.unrotated=bf16"),
        ("full.k.rotated=int8/k=int4", "k=int4"),
        ("recent=4/full.recent=9/first=2", "full.recent=9/sliding.recent=4/full.first=2"),
        ("int4+had/recent=5", "int4+had512/recent=5"),
        ("original+ls/full.v=int3", "int4/full.k.unrotated=int2/full.v=int3"),
    ],
)
def test_later_parts_override_what_they_cover(text, same):
    assert KVPolicy.parse(text) == KVPolicy.parse(same)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int99", "unknown KV policy 'int99'; did you mean int"),
        ("orignal", "did you mean original"),
        ("k=itn4", "unknown scheme 'itn4'; did you mean int4"),
        ("int4-x3", "unknown option of int4 'x3'"),
        ("full.q=int4", "unknown place of K or V 'full.q'; did you mean full."),
        ("k.turned=int4", "unknown place of K or V 'k.turned'"),
        ("int4/original", "the named policy original must come first"),
        ("int4/", "unknown KV policy ''"),
        ("recent=many", "'many' is not a number of tokens"),
        ("sliding.first=4", "a sliding layer loses its first tokens"),
        ("k=int4@0", "'0' is not a number of tokens"),
        ("k=int4@20", "must be a multiple of 8"),
        ("k=int4-g8@16", "not for both"),
        ("k=int4+gptq", "needs a layer's inputs"),
        ("k=bf16@64", "takes no group, hadamard or block"),
        ("k=fp32+had64", "takes no group, hadamard or block"),
        ("k=int4+had48", "must be a power of two"),
        ("k=int4+center0", "unknown stage 'center0'"),
        ("k=int4+center", "unknown stage 'center'"),
        ("k=int4+unbiased+center4", "unknown stage 'unbiased'"),
        ("k=int4+clip50", "must be 1 to 49 percent"),
        ("k=int4-g8+clip5", "without groups"),
        ("k=int4-g8+unbiased", "without groups"),
        ("k=affine4+unbiased", "without a zero point"),
        ("k=int4+pca3-int8", "finds its directions in the tokens of a center"),
        ("k=int4+center8+pca0-int8", "+pca is 1 direction or more"),
        ("k=int4+center8+pca3-itn8", "unknown scheme 'itn8'; did you mean int8"),
        ("k=int4+center8+pca3-int8-g4", "unknown scheme 'int8-g4'"),
        ("k=int4+center8+pca3-bf16", "under a scheme with scales"),
        ("k=int4-g8+center8+pca3-int8", "without groups"),
        ("k=int4+center8+pca3-affine4+unbiased", "without a zero point"),
        ("k=bf16+center4", "nor another option"),
        ("k=int4+\n", "unknown stage"),
    ],
)
def test_a_wrong_policy_is_one_clear_line(text, message):
    with pytest.raises(SpecError) as error:
        KVPolicy.parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Storage(torch.float16),
        lambda: Storage(torch.bfloat16, 64),
        lambda: Storage(torch.bfloat16, center=4),
        lambda: Storage(quantizer("int4"), center=0),
        lambda: Storage(quantizer("int4"), center=8, pca=Pca(0, SCHEMES["int8"])),
        lambda: Storage(quantizer("bf16")),
        lambda: LayerPolicy(recent=-1),
        lambda: KVPolicy(sliding=LayerPolicy(first=3)),
    ],
)
def test_what_no_text_could_say_is_refused_too(build):
    with pytest.raises(SpecError):
        build()


def test_directions_that_do_not_fit_the_head_are_named(config):
    with pytest.raises(SpecError, match="8 dims of layer 2's heads: 8 directions leave nothing of 8 dims"):
        KVCache(config, KVPolicy.parse("full.k.rotated=int4+center8+pca8-int8"))


@pytest.mark.parametrize(
    ("text", "dims", "layer"), [("int4-g12", 16, 0), ("full.k.unrotated=int4-g16", 24, 2), ("full.v=int8-g20", 32, 2)]
)
def test_a_group_that_does_not_fit_the_head_is_named(config, text, dims, layer):
    policy = KVPolicy.parse(text)
    for use in (lambda: KVCache(config, policy), lambda: policy.nbytes(config, 5)):
        with pytest.raises(SpecError, match=rf"does not fit the {dims} dims of layer {layer}'s heads: a group of"):
            use()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 70), st.builds(KVPolicy, full_layers, sliding_layers))
def test_bytes_by_count_are_those_of_a_cache(config, tokens, policy):
    cache = KVCache(config, policy, torch.bfloat16)
    for spec in config.layers[:4]:
        k = torch.ones(2, max(1, tokens), spec.attention.head_dim, dtype=torch.bfloat16)
        if tokens:
            cache.append(spec.index, k, k)
        assert cache.layer_nbytes(spec.index) == policy.layer_nbytes(spec, tokens)
    assert cache.nbytes == policy.nbytes(config, tokens)


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
    assert NAMED[name].layer_nbytes(full_layer(e4b), 8191) == 8191 * a_token


def test_bytes_of_blocks_by_hand(e4b):
    """K of 8191 tokens is 127 blocks of 64, each with 1024 channels, and 63 tokens in two bytes a value."""
    blocks = 127 * 1024 * (64 // 2 + 2) + 63 * 1024 * 2
    assert NAMED["per-channel-k"].layer_nbytes(full_layer(e4b), 8191) == blocks + 8191 * 2 * (256 + 2)
    window = 8 * 512 * (64 // 2 + 2) + 63 * 512 * 2 + 512 * 2 * (128 + 2)
    assert NAMED["per-channel-k"].layer_nbytes(e4b.layers[0], 8191) == window


def asked_bits(policy):
    """The mean bits of a value on E4B's full layers, read off the spec: 128 of 512 dims are rotated."""
    bits = {"bf": 16.0, "fp": 32.0}
    said = {}
    for side in "kv":
        head = getattr(policy.full, side)
        each = [float(bits.get(str(s)[:2]) or re.match(r"[a-z]+(\d)", str(s))[1]) for s in head]
        said[side] = each[0] if len(each) == 1 else each[0] / 4 + each[1] * 3 / 4
    return (said["k"] + said["v"]) / 2


@pytest.mark.parametrize("name", [name for name, policy in NAMED.items() if asked_bits(policy) >= 4])
def test_four_bits_and_more_cost_at_most_a_tenth_beside(e4b, name):
    """Scales and the unquantized tail included, on E4B's full layers at 8191 tokens."""
    policy, spec = NAMED[name], full_layer(e4b)
    stored = 8 * policy.layer_nbytes(spec, 8191) / (8191 * 2 * 2 * 512)
    assert asked_bits(policy) <= stored <= 1.1 * asked_bits(policy)


def test_the_searched_policies_keep_to_their_bytes(e4b):
    """`p-rope` stores no more than the original on full layers, `p-rope-4` at most 4.25 bits a value."""
    spec = full_layer(e4b)
    for tokens in (8191, 32768):
        values = tokens * 2 * 2 * 512
        assert NAMED["p-rope"].layer_nbytes(spec, tokens) <= NAMED["original"].layer_nbytes(spec, tokens)
        assert 8 * NAMED["p-rope-4"].layer_nbytes(spec, tokens) <= 4.25 * values
        assert NAMED["original-inverted"].layer_nbytes(spec, tokens) == NAMED["original"].layer_nbytes(spec, tokens)


def test_the_inverted_policy_has_more_bits_on_the_unrotated_dims():
    rotated, unrotated = (int(re.search(r"\d", str(storage))[0]) for storage in NAMED["original-inverted"].full.k)
    assert rotated < unrotated
    assert asked_bits(NAMED["original-inverted"]) == asked_bits(NAMED["original"]) == 2.5
