"""ggml's types: decoded as gguf-py decodes them, and encoded as near to the weights as blocks of that size allow."""

import math

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from epic_quant.errors import QuantizationError
from epic_quant.metrics import relative_l2
from epic_quant.quant import format_named, from_tensors
from epic_quant.spec import FORMATS, WeightSpec

from .conftest import stored

NAMES = sorted(name for name, info in FORMATS.items() if info.block_nbytes)
every_type = pytest.mark.parametrize("name", NAMES)
# Examples of each type: in all some hundreds of a property, which hold it as well as a hundred of each.
few_of_each = settings(max_examples=30)

# Random draws at unit scale, from Gaussian to heavy tails.
DRAWS = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "student3": lambda rng, shape: rng.standard_t(3, shape),
}


def ggml_type(name):
    return GGMLQuantizationType[name.upper()]


def drawn(distribution, rows=64, cols=2560, seed=7):
    return torch.from_numpy(DRAWS[distribution](np.random.default_rng(seed), (rows, cols))).float()


def assert_same_bits(found, expected):
    """Of fp32 values; what a NaN's bits are is nobody's promise."""
    numbers = ~np.isnan(expected)
    assert np.array_equal(numbers, ~np.isnan(found))
    assert np.array_equal(found.view(np.int32)[numbers], expected.view(np.int32)[numbers])


def test_sizes_are_ggmls():
    assert {name: GGML_QUANT_SIZES[ggml_type(name)] for name in NAMES} == {
        name: (FORMATS[name].block_size, FORMATS[name].block_nbytes) for name in NAMES
    }


@few_of_each
@given(st.data())
@every_type
def test_any_bytes_decode_as_in_gguf(name, data):
    """Scales that are NaN or infinite among them."""
    blocks = data.draw(arrays(np.uint8, (2, 3 * FORMATS[name].block_nbytes), fill=st.integers(0, 255)))
    with np.errstate(invalid="ignore"):
        expected = gguf_dequantize(blocks, ggml_type(name))
    assert_same_bits(format_named(name).decode(torch.from_numpy(blocks)).numpy(), expected)


@pytest.mark.parametrize("seed", range(4))
@every_type
def test_random_bytes_decode_as_in_gguf(name, seed):
    blocks = np.random.default_rng(seed).integers(0, 256, (50, 2 * FORMATS[name].block_nbytes), dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        expected = gguf_dequantize(blocks, ggml_type(name))
    assert_same_bits(format_named(name).decode(torch.from_numpy(blocks)).numpy(), expected)


@pytest.mark.parametrize("scale", [1e-7, 1e-6, 0.02, 1e4, 1e9])
@pytest.mark.parametrize("distribution", DRAWS)
@every_type
def test_what_is_encoded_decodes_as_in_gguf(name, distribution, scale):
    weight = drawn(distribution, rows=4) * scale
    weight[1] = 0.0
    weight[2, 300] = 1000 * scale
    quantized = stored(weight, name)
    assert_same_bits(quantized.dequantize().numpy(), gguf_dequantize(quantized.blocks.numpy(), ggml_type(name)))
    assert not quantized.dequantize()[1].any()


MARKS = {
    "q8_0": (8.5, 0.0050),
    "q6_k": (6.5625, 0.0168),
    "q5_k": (5.5, 0.0350),
    "q4_k": (4.5, 0.0702),
    "q3_k": (3.4375, 0.1440),
    "q2_k": (2.625, 0.2610),
    "q5_0": (5.5, 0.0403),
    "q4_0": (4.5, 0.0814),
    "iq4_nl": (4.5, 0.0740),
    "tq2_0": (2.0625, 0.4360),
    "tq1_0": (1.6875, 0.4360),
}


@every_type
def test_bits_and_error_on_a_gaussian(name):
    quantized = stored(weight := drawn("gaussian", rows=512), name)
    bits, rel_l2 = MARKS[name]
    assert quantized.bits_per_weight == bits
    assert relative_l2(quantized.dequantize(), weight) <= rel_l2


# The types that gguf-py encodes, as ggml's own code does without an importance matrix.
ENCODED_THERE = ["q8_0", "q5_0", "q4_0", "tq1_0", "tq2_0"]


@few_of_each
@given(weight=arrays(np.float32, (2, 512), elements=st.floats(-1e4, 1e4, width=32)))
@pytest.mark.parametrize("name", ENCODED_THERE)
def test_what_gguf_encodes_decodes_as_there(name, weight):
    with np.errstate(all="ignore"):
        blocks = gguf_quantize(weight, ggml_type(name))
    tensors = {"blocks": torch.from_numpy(blocks)}
    read = from_tensors(WeightSpec(name), tensors, weight.shape)
    assert_same_bits(read.dequantize().numpy(), gguf_dequantize(blocks, ggml_type(name)))


@pytest.mark.parametrize("distribution", DRAWS)
@pytest.mark.parametrize("name", ENCODED_THERE)
def test_no_row_is_worse_than_ggmls_own_encoding(name, distribution):
    weight = drawn(distribution)
    theirs = torch.from_numpy(gguf_dequantize(gguf_quantize(weight.numpy(), ggml_type(name)), ggml_type(name)))
    ours, theirs = ((decoded - weight).square().sum(1) for decoded in (stored(weight, name).dequantize(), theirs))
    assert (ours < theirs).all()


def nearest(levels, ratio):
    levels = torch.tensor(levels, dtype=torch.float32)
    return levels[torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2)]


def dense_search(groups, levels, has_minima):
    """The least squared errors of groups [n, size] over many scales, and minima, in fp32 each."""
    least = torch.full((len(groups),), math.inf)
    largest, low = groups.abs().amax(1, keepdim=True), groups.amin(1, keepdim=True).clamp(max=0)
    span = groups.amax(1, keepdim=True) - low
    for part in torch.linspace(0.7, 1.15, 19).tolist() if has_minima else torch.linspace(0.1, 1.3, 121).tolist():
        for shift in torch.linspace(-0.1, 0.25, 8).tolist() if has_minima else (0.0,):
            for sign in (1.0,) if has_minima else (1.0, -1.0):
                scale = sign * part * (span if has_minima else largest) / max(map(abs, levels))
                base = (low + shift * span).clamp(max=0) if has_minima else 0.0
                error = groups - base - nearest(levels, (groups - base) / scale) * scale
                least = torch.minimum(least, error.square().sum(1))
    return least


# How far above a dense search for each group alone: scales and minima in few bits cost some of it.
EXCESS = {"q8_0": 1.02, "q6_k": 1.02, "q5_k": 1.02, "q4_k": 1.01, "q2_k": 1.02, "q3_k": 1.01, "iq4_nl": 1.01}


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
@every_type
def test_groups_are_near_the_best_of_a_dense_search(name, distribution):
    weight, codec = drawn(distribution, rows=4), format_named(name)
    num_groups, has_minima = (
        (1, False) if codec.groups is None else (codec.groups.number, codec.groups.min_at is not None)
    )
    groups = weight.reshape(-1, FORMATS[name].block_size // num_groups)
    best = dense_search(groups, codec.levels.values, has_minima)
    error = relative_l2(stored(weight, name).dequantize(), weight)
    assert error <= EXCESS.get(name, 1.005) * math.sqrt(best.sum() / groups.square().sum())


@every_type
def test_a_format_stores_as_many_levels_as_its_row_says(name):
    weight = torch.linspace(-1, 1, FORMATS[name].block_size).unsqueeze(0)
    codes = format_named(name).codes.read(stored(weight, name).blocks)
    assert int(codes.max()) < FORMATS[name].num_levels == len(format_named(name).levels.values)
    every = torch.arange(FORMATS[name].num_levels).to(torch.uint8)
    assert torch.equal(format_named(name).levels.encode(format_named(name).levels.decode(every)), every)


@few_of_each
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-12, 6),
    offset=st.floats(-3, 3),
    kept=st.floats(0.01, 1),
    df=st.floats(1, 30),
)
@every_type
def test_nothing_is_further_from_a_block_than_zeros(name, seed, exponent, offset, kept, df):
    """Weights around any mean, sparse, with any tails, down to where fp16 has no scale for them."""
    rng, shape = np.random.default_rng(seed), (2, FORMATS[name].block_size)
    values = (rng.standard_t(df, shape) + offset) * (rng.random(shape) < kept) * 10.0**exponent
    weight = torch.from_numpy(values).float().clamp(-(2.0**25), 2.0**25)
    error = (format_named(name).decode(format_named(name).encode(weight)) - weight).double().square().sum(1)
    assert (error <= weight.double().square().sum(1)).all()


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "q2_k", "iq4_nl", "tq2_0"])
def test_columns_of_more_importance_come_nearer(name):
    weight, codec = drawn("gaussian", rows=32, cols=512), format_named(name)
    importance = 10.0 ** torch.randn(512, generator=torch.Generator().manual_seed(1))
    importance[5:9] = 0.0
    plain, weighted = (codec.decode(codec.encode(weight, given)) - weight for given in (None, importance))
    assert (weighted.square() * importance).sum() < (0.95 if "tq" in name else 0.7) * (
        plain.square() * importance
    ).sum()
    assert weighted.square().sum() > plain.square().sum()
    for alike in (torch.ones(512), torch.zeros(512)):
        error = codec.decode(codec.encode(weight, alike)) - weight
        assert error.norm().item() == pytest.approx(plain.norm().item(), rel=1e-3)


@few_of_each
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 3), zeros=st.floats(0, 1), df=st.floats(1, 30))
@every_type
def test_no_block_is_further_by_a_hessian_than_without(name, seed, spread, zeros, df):
    """By its diagonal: also where it is nearly flat, where the search alone would at times be worse."""
    rng, cols = np.random.default_rng(seed), 2 * FORMATS[name].block_size
    inputs = torch.from_numpy(rng.standard_normal((5, cols)) * 10.0 ** rng.normal(0, spread, cols))
    hessian = inputs.T @ inputs * torch.from_numpy(rng.random(cols) >= zeros)
    hessian = (hessian + hessian.T) / 2
    weight = torch.from_numpy(rng.standard_t(df, (3, cols))).float()
    plain, fitted = (
        ((stored(weight, spec, hessian).dequantize() - weight).double().square() * hessian.diagonal())
        .view(-1, FORMATS[name].block_size)
        .sum(1)
        for spec in (name, f"{name}+imatrix")
    )
    assert (fitted <= plain * (1 + 1e-5)).all()


def test_what_importance_comes_from_is_the_diagonal_of_a_hessian():
    weight, rng = drawn("gaussian", rows=8, cols=512), torch.Generator().manual_seed(1)
    hessian = torch.diag(10.0 ** torch.randn(512, generator=rng))
    found = stored(weight, "q4_k+imatrix", hessian)
    assert str(found.spec) == "q4_k+imatrix"
    assert torch.equal(found.blocks, format_named("q4_k").encode(weight, hessian.diagonal()))
    assert found.nbytes == stored(weight, "q4_k").nbytes
    with pytest.raises(QuantizationError, match="imatrix needs the Hessian of the layer's inputs, and got none"):
        stored(weight, "q4_k+imatrix")
    with pytest.raises(QuantizationError, match=r"the Hessian has the shape \[512, 3\]"):
        stored(weight, "q4_k+imatrix", hessian[:, :3])


@pytest.mark.parametrize("importance", [torch.ones(3), -torch.ones(256), torch.full((256,), math.nan)])
def test_importance_that_is_none_is_refused(importance):
    with pytest.raises(QuantizationError, match="no 256 finite numbers that are at least 0"):
        format_named("q4_k").encode(torch.ones(2, 256), importance)


def test_products_of_a_single_row_and_of_none():
    """A row of blocks may begin at an odd byte of a file."""
    weight, x = drawn("gaussian", rows=3, cols=256), torch.ones(2, 256)
    quantized = stored(weight, "q6_k")
    odd = torch.cat([torch.zeros(1, dtype=torch.uint8), quantized.blocks[1]])[1:].unsqueeze(0)
    assert torch.equal(format_named("q6_k").decode(odd)[0], quantized.dequantize()[1])
    assert quantized.rows(torch.tensor([], dtype=torch.int64)).matmul(x).shape == (2, 0)
    assert quantized.spec == WeightSpec("q6_k")
    assert repr(quantized) == "BlockMatrix(q6_k, [3, 256], 6.562 bits a weight)"
