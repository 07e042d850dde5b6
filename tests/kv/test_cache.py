"""What is stored and what comes back, against the quantizers of quant/ and NumPy."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CacheError
from epic_quant.gemma4.model import TextModel
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.kv import KVCache, directions
from epic_quant.metrics import relative_l2
from epic_quant.quant import hadamard, quantize
from epic_quant.spec import NAMED_KV, KVSpec, WeightSpec

SLIDING, FULL, SHARING = 0, 2, 4
WINDOW = 20
ROTATED = [*range(4), *range(16, 20)]
UNROTATED = [*range(4, 16), *range(20, 32)]


def keys_and_values(config, layer, tokens, seed=0, dtype=torch.float32):
    shape = (2, 2, tokens, config.layers[layer].attention.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).unbind(0)


def filled(config, policy, layer, k, v, chunks=None):
    """A cache that took these tokens of one layer, in chunks of so many."""
    cache = KVCache(config, KVSpec.parse(policy), k.dtype)
    for its_k, its_v in zip(k.split(chunks or k.shape[1], dim=1), v.split(chunks or k.shape[1], dim=1), strict=True):
        cache.append(layer, its_k[None], its_v[None])
    return cache


def rows_decoded(spec, rows):
    """[..., cols] quantized and decoded again, by the quantizer alone."""
    return quantize(rows.reshape(-1, rows.shape[-1]), WeightSpec.parse(spec)).dequantize().view(rows.shape)


def channels_decoded(spec, x, block):
    """[heads, tokens, dims], tokens in whole blocks: each channel's values over a block are a row."""
    blocks = x.unflatten(1, (-1, block)).mT
    return rows_decoded(spec, blocks).mT.flatten(1, 2)


@pytest.mark.parametrize("spec", ["int4", "int3-g8", "codebook2+had32", "ternary", "int8-g16+had16", "absmax2"])
def test_a_token_and_head_is_a_row_of_the_quantizer(config, spec):
    k, v = keys_and_values(config, FULL, 11)
    cache = filled(config, spec, FULL, k, v)
    assert torch.equal(cache.keys(FULL)[0], rows_decoded(spec, k))
    assert torch.equal(cache.values(FULL)[0], rows_decoded(spec, v))


@pytest.mark.parametrize("spec", ["int4", "codebook3", "ternary", "absmax2"])
def test_a_channel_over_a_block_is_a_row_of_the_quantizer(config, spec):
    k, v = keys_and_values(config, FULL, 24)
    cache = filled(config, f"v={spec}-b8/k={spec}-b16", FULL, k, v)
    assert torch.equal(cache.values(FULL)[0], channels_decoded(spec, v, 8))
    assert torch.equal(cache.keys(FULL)[0][:, :16], channels_decoded(spec, k[:, :16], 16))
    assert torch.equal(cache.keys(FULL)[0][:, 16:], k[:, 16:]), "a block that is not full is kept as it came"


def test_blocks_are_rotated_over_the_dims(config):
    k, v = keys_and_values(config, FULL, 16)
    expected = hadamard.unrotate(channels_decoded("int4", hadamard.rotate(k, 32), 8), 32)
    assert relative_l2(filled(config, "int4-b8+had64", FULL, k, v).keys(FULL)[0], expected) <= 1e-6


def test_rotated_and_unrotated_dims_are_stored_apart(config):
    """The dims that RoPE rotates are [0:4] and [16:20] of 32; of the 24 others a Hadamard block takes 8."""
    k, v = keys_and_values(config, FULL, 16)
    cache = filled(config, "k.rotated=int4+had64/k.unrotated=int3-b8/v.unrotated=codebook2+had64", FULL, k, v)
    assert torch.equal(cache.keys(FULL)[0][..., ROTATED], rows_decoded("int4+had8", k[..., ROTATED]))
    assert torch.equal(cache.keys(FULL)[0][..., UNROTATED], channels_decoded("int3", k[..., UNROTATED], 8))
    assert torch.equal(cache.values(FULL)[0][..., ROTATED], v[..., ROTATED].bfloat16().float())
    assert torch.equal(cache.values(FULL)[0][..., UNROTATED], rows_decoded("codebook2+had8", v[..., UNROTATED]))


@pytest.mark.parametrize(("sinks", "padding"), [(3, 3), (8, 0), (11, 3)])
def test_blocks_begin_at_multiples_of_their_length(config, sinks, padding):
    """The places of the first tokens, which are kept as they came, hold the token after them."""
    k, v = keys_and_values(config, FULL, 27)
    k[:, :sinks] *= 100
    cache = filled(config, f"k=affine2-b8/sinks={sinks}", FULL, k, v)
    body = k[:, sinks - padding : 24].clone()
    body[:, :padding] = body[:, padding : padding + 1]
    assert torch.equal(cache.keys(FULL)[0][:, :sinks], k[:, :sinks])
    assert torch.equal(cache.keys(FULL)[0][:, sinks:24], channels_decoded("affine2", body, 8)[:, padding:])
    assert torch.equal(cache.keys(FULL)[0][:, 24:], k[:, 24:])
    assert cache.nbytes == 64 * ((sinks + 3) * 4 + body.shape[1] // 8 * (2 + 2 * 2) + 27 * 2)


def means(x):
    """Of tokens, [heads, tokens, dims] to [heads, 1, dims], as they are stored."""
    return torch.from_numpy(x.double().numpy().mean(1, keepdims=True).astype(np.float16)).float()


@pytest.mark.parametrize("spec", ["int4", "codebook2+had32"])
def test_a_center_is_the_mean_of_the_first_quantized_tokens(config, spec):
    k, v = (x + 3 for x in keys_and_values(config, FULL, 30))
    cache = filled(config, f"k={spec}+center9/sinks=2/residual=4", FULL, k, v)
    mean = means(k[:, 2:11])
    expected = torch.cat([k[:, :2], rows_decoded(spec, k[:, 2:26] - mean) + mean, k[:, 26:]], dim=1)
    assert relative_l2(cache.keys(FULL)[0], expected) <= 1e-6
    row = {"int4": 16, "codebook2+had32": 8}[spec] + 2
    assert cache.nbytes == 2 * (24 * row + 6 * 32 * 4 + 32 * 2) + 2 * 30 * 32 * 2


def test_a_center_of_blocks_is_that_of_whole_ones(config):
    """Of two blocks of 8 for 9 tokens, without the first ones; till then tokens wait, and no center is stored."""
    k, v = (x + 3 for x in keys_and_values(config, FULL, 30))
    policy = "k=int3-b8+center9/sinks=3"
    cache = filled(config, policy, FULL, k, v)
    mean, body = means(k[:, 3:16]), k[:, :24].clone()
    body[:, :3] = body[:, 3:4]
    expected = channels_decoded("int3", body - mean, 8) + mean
    assert relative_l2(cache.keys(FULL)[0][:, 3:24], expected[:, 3:]) <= 1e-6
    waiting = filled(config, policy, FULL, k[:, :15], v[:, :15])
    assert torch.equal(waiting.keys(FULL)[0], k[:, :15])
    assert waiting.nbytes == 15 * 64 * (4 + 2)


def test_a_ring_keeps_its_center(config):
    """And takes no more tokens for it than the window holds."""
    k, v = (x + 3 for x in keys_and_values(config, SLIDING, 60))
    cache = filled(config, "k=int4+center64", SLIDING, k, v, chunks=7)
    mean = means(k[:, :WINDOW])
    expected = rows_decoded("int4", k[:, -WINDOW:] - mean) + mean
    assert relative_l2(cache.keys(SLIDING)[0], expected) <= 1e-6
    assert cache.nbytes == 2 * (WINDOW * (8 + 2) + 16 * 2) + 2 * WINDOW * 16 * 2


@pytest.mark.parametrize(("spec", "along"), [("int3", "int8"), ("codebook2+had32", "codebook4")])
def test_principal_coordinates_are_stored_apart(config, spec, along):
    """Rotated as fitted to the center's tokens; the two sets of coordinates are rows of their own."""
    k, v = keys_and_values(config, FULL, 30)
    cache = filled(config, f"k={spec}+center12+pca4-{along}/sinks=2", FULL, k, v)
    mean = means(k[:, 2:14])
    x = (k[:, 2:] - mean).transpose(0, 1)
    found = directions.reflectors(x[:12], 4, torch.float16)
    rotated = directions.rotate(x, found)
    # Of the 28 others a Hadamard block takes 4.
    specs = (f"{along}+had4" if "had" in spec else along), spec.replace("32", "4")
    parts = [rows_decoded(*part) for part in zip(specs, rotated.split([4, 28], dim=-1), strict=True)]
    expected = directions.unrotate(torch.cat(parts, dim=-1), found).transpose(0, 1) + mean
    assert relative_l2(cache.keys(FULL)[0][:, 2:], expected) <= 1e-6
    row = {"int3": 11 + 4, "codebook2+had32": 7 + 2}[spec] + 4
    assert cache.nbytes == 2 * (28 * row + 2 * 32 * 4 + (1 + 4) * 32 * 2) + 2 * 30 * 32 * 2


def test_what_varies_in_few_directions_takes_few_bits(config):
    """Three directions hold all but a little: in 8 bits they and in 2 the others come to less than 6 bits for all."""
    tokens = 400
    rng = torch.Generator().manual_seed(0)
    along, across = torch.randn(2, tokens, 3, generator=rng), torch.randn(2, 3, 32, generator=rng)
    k = along @ across + torch.randn(2, tokens, 32, generator=rng) / 50 + 3
    plain, rotated = (
        relative_l2(filled(config, f"k={spec}/sinks=1", FULL, k, k).keys(FULL)[0], k)
        for spec in ("int6+center64", "int2+center64+pca3-int8")
    )
    assert rotated < plain


def test_what_is_clipped_is_the_outer_part_of_the_range(config):
    k, v = keys_and_values(config, FULL, 16)
    blocks = k.unflatten(1, (-1, 8)).numpy()
    low, high = blocks.min(2, keepdims=True), blocks.max(2, keepdims=True)
    inner = np.clip(blocks, low + (high - low) / 10, high - (high - low) / 10)
    expected = channels_decoded("affine2", torch.from_numpy(inner).flatten(1, 2), 8)
    assert relative_l2(filled(config, "affine2-b8+clip10", FULL, k, v).keys(FULL)[0], expected) <= 1e-3


@pytest.mark.parametrize("spec", ["codebook2+had32", "int2", "ternary"])
def test_unbiased_rows_are_those_of_the_quantizer_at_their_right_length(config, spec):
    """<x, y> = <x, x>, up to the rounding of a scale to fp16."""
    k, v = keys_and_values(config, FULL, 16)
    plain = rows_decoded(spec, k)
    expected = plain * (k.square().sum(-1, keepdim=True) / (k * plain).sum(-1, keepdim=True))
    assert relative_l2(filled(config, f"{spec}+unbiased", FULL, k, v).keys(FULL)[0], expected) <= 1e-3
    for extreme in (k * 1e35, k * 0):
        assert filled(config, f"{spec}+unbiased", FULL, extreme, v).keys(FULL)[0].isfinite().all()


def test_a_sliding_head_is_rotated_whole(config):
    k, v = keys_and_values(config, SLIDING, 5)
    cache = filled(config, "k.rotated=int4/k.unrotated=int8", SLIDING, k, v)
    assert torch.equal(cache.keys(SLIDING)[0], rows_decoded("int4", k))


def test_the_originals_codes_in_numpy(config):
    """Scales of absmax / 7 and codes -8..7 on the rotated dims, of absmax / 2 and codes -2..1 on the others."""
    k, v = keys_and_values(config, FULL, 9)
    for x, out in zip((k, v), (lambda c: c.keys(FULL)[0], lambda c: c.values(FULL)[0]), strict=True):
        expected = np.empty(x.shape, np.float32)
        for dims, divisor, low, high in ((ROTATED, 7, -8, 7), (UNROTATED, 2, -2, 1)):
            part = x.numpy()[..., dims]
            scale = np.abs(part).max(-1, keepdims=True) / np.float32(divisor)
            codes = np.clip(np.round(part / scale), low, high)
            expected[..., dims] = codes * scale.astype(np.float16).astype(np.float32)
        assert np.array_equal(out(filled(config, "original", FULL, k, v)).numpy(), expected)


def test_stored_bytes_by_hand(config):
    """27 tokens of a full layer of 2 heads: K in 3 blocks of 8 and 3 tokens as they came, V in rows of 24 and of 8."""
    k, v = keys_and_values(config, FULL, 27)
    cache = filled(config, "k=int3-b8/v.rotated=int8/v.unrotated=int4-g8", FULL, k, v)
    blocks = 3 * 2 * 32 * (3 + 2) + 3 * 2 * 32 * 4
    rows = 27 * 2 * ((8 + 2) + (12 + 3 * 2))
    assert cache.layer_nbytes(FULL) == cache.nbytes == blocks + rows
    assert cache.bits_per_value == 8 * (blocks + rows) / (2 * 27 * 2 * 32)
    assert cache.nbytes <= cache.allocated_nbytes <= 2 * cache.nbytes


def test_bytes_of_a_ring_stop_growing(config):
    """A window of 20 is 3 blocks of 8, and as many as 7 tokens wait for the next block."""
    k, v = keys_and_values(config, SLIDING, 101)
    cache = filled(config, "k=int4-b8/v=int4", SLIDING, k, v, chunks=7)
    block, row = 2 * 16 * (4 + 2), 2 * 16 * 4
    assert cache.nbytes == 3 * block + 101 % 8 * row + WINDOW * 2 * (8 + 2)
    assert cache.bits_per_value == 8 * cache.nbytes / (2 * WINDOW * 2 * 16)


POLICIES = [
    "fp32",
    "int4",
    "k=int4-b8/v=int3-g8",
    "int4-b64/residual=5",
    "k.rotated=int4-b16/k.unrotated=int2/residual=3/sinks=5",
    "absmax4/full.k.unrotated=absmax2-b8/residual=25/sinks=1",
    "k=int4+center7/v=affine2-b8+clip10/residual=4/sinks=11",
    "k=int2-b16+center20+unbiased/v=int3-g8+center40/sinks=5",
    "k=int2+had8+center20+pca5-int5+unbiased/v=ternary-b8+center20+pca3-codebook4/sinks=5",
]


@pytest.mark.parametrize("layer", [SLIDING, FULL])
@settings(max_examples=15)
@given(policy=st.sampled_from(POLICIES), chunks=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_chunks_make_no_difference(config, layer, policy, chunks):
    """Of any sizes, across windows and blocks: the tokens are stored as if they had come at once."""
    k, v = keys_and_values(config, layer, sum(chunks))
    whole = filled(config, policy, layer, k, v)
    parts = filled(config, policy, layer, k, v, chunks)
    assert torch.equal(parts.keys(layer)[0], whole.keys(layer)[0])
    assert torch.equal(parts.values(layer)[0], whole.values(layer)[0])
    assert parts.nbytes == whole.nbytes


@pytest.mark.parametrize("name", NAMED_KV)
def test_named_policies_take_tokens_one_by_one(config, name):
    """As many as at once, and the same within rounding: a rotation of one token may round otherwise than of many."""
    for layer in (SLIDING, FULL):
        k, v = keys_and_values(config, layer, 70)
        whole, parts = (filled(config, name, layer, k, v, chunks) for chunks in (70, 1))
        assert relative_l2(parts.keys(layer)[0], whole.keys(layer)[0]) <= 1e-2
        assert relative_l2(parts.values(layer)[0], whole.values(layer)[0]) <= 1e-2
        assert parts.nbytes == whole.nbytes


@pytest.mark.parametrize("policy", ["fp32", "int8-b8/residual=20", "int8/residual=40"])
@pytest.mark.parametrize("tokens", [1, 19, 20, 21, 47])
def test_a_sliding_layer_keeps_the_newest_window(config, policy, tokens):
    """Oldest first, and as they came where the policy leaves a whole window unquantized."""
    k, v = keys_and_values(config, SLIDING, tokens)
    cache = filled(config, policy, SLIDING, k, v, chunks=6)
    assert torch.equal(cache.keys(SLIDING)[0], k[:, -WINDOW:])
    assert torch.equal(cache.values(SLIDING)[0], v[:, -WINDOW:])


@pytest.mark.parametrize("policy", ["int2/residual=7/sinks=3", "int2-b8/residual=7/sinks=3"])
def test_attention_sinks_and_the_residual_window_are_exact_and_no_others(config, policy):
    """In the compute dtype, whatever it is."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        k, v = keys_and_values(config, FULL, 42, dtype=dtype)
        cache = filled(config, policy, FULL, k, v, chunks=5)
        for given_, back in ((k, cache.keys(FULL)[0]), (v, cache.values(FULL)[0])):
            assert back.dtype == dtype
            assert torch.equal(back[:, :3], given_[:, :3])
            assert torch.equal(back[:, -7:], given_[:, -7:])
            assert not (back[:, 3:-14] == given_[:, 3:-14]).all(dim=(0, 2)).any()


def test_the_first_tokens_of_a_sliding_layer_leave_the_window(config):
    k, v = keys_and_values(config, SLIDING, 30)
    with_first, without = (filled(config, policy, SLIDING, k, v) for policy in ("int4/sinks=5", "int4"))
    assert torch.equal(with_first.keys(SLIDING)[0], without.keys(SLIDING)[0])
    assert with_first.nbytes == without.nbytes


def test_bf16_and_fp32_are_what_they_say(config):
    k, v = keys_and_values(config, FULL, 6)
    assert torch.equal(filled(config, "bf16", FULL, k, v).keys(FULL)[0], k.bfloat16().float())
    assert torch.equal(filled(config, "fp32", FULL, k, v).keys(FULL)[0], k)


def test_decoding_allocates_seldom(config):
    """Five hundred tokens one by one: memory grows by half at a time, and never for a ring that is full."""
    cache = KVCache(config, KVSpec.parse("absmax4-b8/residual=4"))
    sizes = {FULL: set(), SLIDING: set()}
    for layer, seen in sizes.items():
        k, v = keys_and_values(config, layer, 500)
        before = cache.allocated_nbytes
        for token in range(500):
            cache.append(layer, k[None, :, token : token + 1], v[None, :, token : token + 1])
            seen.add(cache.allocated_nbytes - before)
    assert len(sizes[FULL]) <= 30
    assert len(sizes[SLIDING]) <= 15


def test_a_long_prompt_is_stored_in_chunks(config):
    """32,768 tokens at once; their bytes are a token's times as many."""
    k, v = keys_and_values(config, FULL, 32768, dtype=torch.bfloat16)
    cache = filled(config, "int4", FULL, k, v)
    assert cache.nbytes == 32768 * 2 * 2 * (16 + 2)
    last = slice(-5, None)
    assert torch.equal(cache.keys(FULL)[0][:, last], rows_decoded("int4", k[:, last]).bfloat16())


@pytest.mark.parametrize(
    "policy", ["k=int4-b8/v=int4/residual=3/sinks=2", "k=int4-b8+center9+pca2-int8/v=int4+center5/sinks=2"]
)
def test_a_reset_cache_is_as_new(config, policy):
    k, v = keys_and_values(config, FULL, 50)
    used, fresh = (
        filled(config, policy, FULL, *keys_and_values(config, FULL, 33, seed=1)),
        KVCache(config, KVSpec.parse(policy)),
    )
    used.reset()
    assert used.nbytes == 0
    with pytest.raises(CacheError, match="holds no K and V yet"):
        used.keys(FULL)[0]
    for cache in (used, fresh):
        cache.append(FULL, k[None], v[None])
    assert torch.equal(used.keys(FULL)[0], fresh.keys(FULL)[0])
    assert used.nbytes == fresh.nbytes


def test_a_sharing_layer_reads_its_source(config):
    k, v = keys_and_values(config, 3, 8)
    cache = filled(config, "int4", 3, k, v)
    assert torch.equal(cache.keys(SHARING)[0], cache.keys(3)[0])
    assert torch.equal(cache.values(SHARING)[0], cache.values(3)[0])
    assert cache.layer_nbytes(SHARING) == 0
    assert cache.nbytes == cache.layer_nbytes(3)


def bad(change, which=None, layer=FULL, tokens=4):
    """K and V, both or one of them changed, refused by `append` and by `update` in the same words."""

    def take(cache, config):
        pair = [x[None] for x in keys_and_values(config, layer, tokens)]
        pair = [change(x) if which in (None, place) else x for place, x in enumerate(pair)]
        with pytest.raises(CacheError) as error:
            cache.append(layer, *pair)
        with pytest.raises(CacheError, match=f"^{re.escape(str(error.value))}$"):
            cache.update(layer, *pair)
        raise error.value

    return take


def with_value(x, value):
    x = x.clone()
    x[0, 1, 2, 3] = value
    return x


EXPECTED = r"; expected \[1, 2, tokens, 32\]$"
BAD = {
    "no tokens": (bad(lambda x: x[:, :, :0], 0), rf"K of layer 2 is of shape \[1, 2, 0, 32\]{EXPECTED}"),
    "heads": (bad(lambda x: x[:, :1], 0), rf"K of layer 2 is of shape \[1, 1, 4, 32\]{EXPECTED}"),
    "head_dim": (bad(lambda x: x[..., :16], 1), rf"V of layer 2 is of shape \[1, 2, 4, 16\]{EXPECTED}"),
    "batch": (bad(lambda x: x.expand(3, -1, -1, -1)), rf"K of layer 2 is of shape \[3, 2, 4, 32\]{EXPECTED}"),
    "a number": (bad(lambda x: x.sum()), rf"K of layer 2 is of shape \[\]{EXPECTED}"),
    "one dim": (bad(lambda x: x[0, 0, 0]), rf"K of layer 2 is of shape \[32\]{EXPECTED}"),
    "three dims": (bad(lambda x: x[0]), rf"K of layer 2 is of shape \[2, 4, 32\]{EXPECTED}"),
    "five dims": (bad(lambda x: x[None], 1), rf"V of layer 2 is of shape \[1, 1, 2, 4, 32\]{EXPECTED}"),
    "tokens": (bad(lambda x: x[:, :, :3], 1), "^layer 2 got K of 4 tokens and V of 3$"),
    "beyond the window": (
        bad(lambda x: x[:, :, :-1], 1, SLIDING, WINDOW + 5),
        "^layer 0 got K of 25 tokens and V of 24$",
    ),
    "dtype": (bad(lambda x: x.bfloat16(), 0), "K of layer 2 is torch.bfloat16; this cache's dtype is torch.float32"),
    "integers": (bad(lambda x: x.int(), 1), "V of layer 2 is torch.int32"),
    "nan": (bad(lambda x: with_value(x, torch.nan), 1), "V of layer 2 has NaN or infinity"),
    "inf": (bad(lambda x: with_value(x, -torch.inf), 0), "K of layer 2 has NaN or infinity"),
    "sharing": (bad(lambda x: x, layer=SHARING), "layer 4 stores no K and V: it shares those of layer 3"),
    "layer": (
        lambda cache, config: cache.append(5, *keys_and_values(config, FULL, 4)),
        "there is no layer 5; expected 0 to 4",
    ),
    "negative layer": (lambda cache, config: cache.keys(-1)[0], "there is no layer -1"),
    "empty": (lambda cache, config: cache.keys(3)[0], "layer 3 holds no K and V yet"),
    "empty source": (lambda cache, config: cache.values(SHARING)[0], "layer 4 holds no K and V yet"),
}


@pytest.mark.parametrize(("act", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line_and_changes_nothing(config, act, message):
    k, v = keys_and_values(config, FULL, 30)
    cache = filled(config, "k=int4-b8/v=int4/residual=2", FULL, k, v)
    before = cache.nbytes, cache.keys(FULL)[0].clone(), cache.values(FULL)[0].clone()
    with pytest.raises(CacheError, match=message) as error:
        act(cache, config)
    assert "\n" not in str(error.value)
    assert cache.nbytes == before[0]
    assert torch.equal(cache.keys(FULL)[0], before[1])
    assert torch.equal(cache.values(FULL)[0], before[2])


@pytest.mark.parametrize("spec", ["int4+center8+pca2-int8", "int4-b8+had8", "int4+had8+clip5", "affine4-b8+center8"])
def test_the_largest_values_are_stored_as_finite_ones(config, spec):
    cache = KVCache(config, KVSpec.parse(spec))
    k = torch.full((2, 24, 32), 3e38)
    cache.append(FULL, k[None], -k[None])
    assert cache.keys(FULL)[0].isfinite().all()
    assert cache.values(FULL)[0].isfinite().all()


def test_values_beyond_fp32_are_refused(config):
    """Codes are chosen in fp32, where they would be infinite."""
    cache = KVCache(config, KVSpec.parse("int4"), torch.float64)
    k = torch.full((2, 1, 32), 1e300, dtype=torch.float64)
    with pytest.raises(CacheError, match="infinity"):
        cache.append(FULL, k[None], k[None])


def test_an_empty_cache_has_no_bits(config):
    with pytest.raises(CacheError, match="an empty KV cache"):
        _ = KVCache(config, KVSpec()).bits_per_value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, r"computes in torch\.int8; expected a float dtype"),
        ({"batch_size": 0}, "a batch of 0 sequences; expected 1 or more"),
        ({"batch_size": -2}, "a batch of -2 sequences"),
        ({"batch_size": 1.5}, r"a batch of 1\.5 sequences"),
        ({"layers": {7: KVSpec()}}, "there is no layer 7; expected 0 to 4"),
        ({"layers": {2: KVSpec(), SHARING: KVSpec()}}, "layer 4 stores no K and V: it shares those of layer 3"),
    ],
)
def test_a_cache_that_makes_no_sense_is_not_made(config, options, message):
    with pytest.raises(CacheError, match=message):
        KVCache(config, KVSpec(), **options)


@settings(max_examples=20)
@given(policy=st.sampled_from(POLICIES), chunks=st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_a_batch_is_stored_and_read_as_its_sequences_alone(config, policy, chunks):
    """To the bit, with everything that one update gives back, across windows and blocks."""
    spec = KVSpec.parse(policy)
    for layer in (SLIDING, FULL):
        k, v = torch.randn(
            2, 3, 2, sum(chunks), config.layers[layer].attention.head_dim, generator=torch.Generator().manual_seed(7)
        )
        together, alone = KVCache(config, spec, batch_size=3), [KVCache(config, spec) for _ in range(3)]
        for its_k, its_v in zip(k.split(chunks, dim=2), v.split(chunks, dim=2), strict=True):
            keys, values = together.update(layer, its_k, its_v)
            for number, cache in enumerate(alone):
                one = slice(number, number + 1)
                expected = cache.update(layer, its_k[one], its_v[one])
                assert torch.equal(keys[one], expected[0])
                assert torch.equal(values[one], expected[1])
        assert together.nbytes == sum(cache.nbytes for cache in alone)
        assert together.bits_per_value == alone[0].bits_per_value


def test_an_update_longer_than_a_window_gives_back_all_that_its_tokens_see(config):
    k, v = keys_and_values(config, SLIDING, 70)
    cache = KVCache(config, KVSpec.parse("fp32"))
    cache.append(SLIDING, k[None, :, :25], v[None, :, :25])
    keys, values = cache.update(SLIDING, k[None, :, 25:], v[None, :, 25:])
    assert torch.equal(keys[0], k[:, 25 - WINDOW :])
    assert torch.equal(values[0], v[:, 25 - WINDOW :])


def test_a_layer_may_have_a_spec_of_its_own(config):
    k, v = keys_and_values(config, FULL, 9)
    cache = KVCache(config, KVSpec.parse("int4"), layers={3: KVSpec.parse("int8")})
    for layer, spec in ((2, "int4"), (3, "int8")):
        keys, _ = cache.update(layer, k[None], v[None])
        assert torch.equal(keys[0], rows_decoded(spec, k))


@pytest.mark.parametrize("name", ["e4b", "e2b", "no_sharing", "other_rope"])
@pytest.mark.parametrize("chunks", [[1] * 17, [9] + [1] * 8, [4, 5, 1, 7]], ids=["one by one", "prefill", "in chunks"])
def test_decoding_with_fp32_storage_is_the_forward_without_a_cache(toy, name, chunks):
    ids = torch.randint(0, 120, (1, 17), generator=torch.Generator().manual_seed(5))
    with Checkpoint.open(toy(name)) as checkpoint:
        model = TextModel(CheckpointWeights(checkpoint))
        cache, parts, start = KVCache(model.config, KVSpec.parse("fp32")), [], 0
        for chunk in ids.split(chunks, dim=1):
            parts.append(model.logits(chunk, cache, start))
            start += chunk.shape[1]
        assert relative_l2(torch.cat(parts, dim=1), model.logits(ids)) <= 1e-5


def test_the_forward_sees_what_the_cache_stored(toy):
    """One token after a prompt: a store of 8 bits changes the logits little, one of 2 bits much."""
    ids = torch.randint(0, 120, (1, 9), generator=torch.Generator().manual_seed(5))
    with Checkpoint.open(toy("e2b")) as checkpoint:
        model, errors = TextModel(CheckpointWeights(checkpoint)), []
        for policy in ("int8", "int2"):
            cache = KVCache(model.config, KVSpec.parse(policy))
            model.logits(ids[:, :8], cache)
            errors.append(relative_l2(model.logits(ids[:, 8:], cache, 8), model.logits(ids)[:, 8:]))
    assert 0 < 2 * errors[0] < errors[1]
