"""Native quantizing, decoding and rotating, held against the torch reference bit for bit."""

import math
import os
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_quant import kernels
from epic_quant.errors import KernelError, QuantizationError
from epic_quant.kernels.matrix import Rotation, rotate
from epic_quant.quant import GroupedMatrix, format_named, hadamard, quantize
from epic_quant.spec import FORMATS, WeightSpec

parse = WeightSpec.parse

NAMES = sorted(name for name, info in FORMATS.items() if info.has_groups and format_named(name).rule is not None)
ISAS = kernels.isas()[:-1] or [kernels.REFERENCE]
SUFFIXES = ["", "-g1", "-g4", "-g16", "-g128", "+had1", "+had2", "+had4", "+had16", "-g32+had256", "-g4+had1024"]
COLS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 31, 40, 127, 128, 160, 256, 640, 1024, 2561]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# What a row may be made of, from standard normal values.
ROWS = {
    "Gaussian": lambda x: x,
    "heavy tails": lambda x: x**7,
    "an outlier": lambda x: torch.where(torch.arange(len(x)) == len(x) // 2, 3000.0, x),
    "zeros": torch.zeros_like,
    "minus zeros": lambda x: -torch.zeros_like(x),
    "a constant": lambda x: torch.full_like(x, -0.25),
    "a grid": lambda x: (3 * x).round() / 4,
    "halves, where roundings tie": lambda x: (3 * x).round() + 0.5,
    "one sign": torch.Tensor.abs,
    "all but one zero": lambda x: torch.where(torch.arange(len(x)) == 0, x, 0.0),
    "scales below fp16": lambda x: x * 1e-9,
    "subnormal scales": lambda x: x * 1e-6,
    "denormals": lambda x: x * 1e-39,
    "scales beyond fp16": lambda x: x * 1e7,
    "numbers near the largest": lambda x: x / x.abs().max() * 3.38e38,
}


@contextmanager
def computing_with(isa):
    with mock.patch.dict(os.environ, EPIC_QUANT_ISA=isa):
        kernels.isa.cache_clear()
        try:
            yield
        finally:
            kernels.isa.cache_clear()


def by_reference(compute):
    with computing_with(kernels.REFERENCE):
        return compute()


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_same(weight, spec, isa):
    expected = by_reference(lambda: quantize(weight, parse(spec)))
    with computing_with(isa):
        found = quantize(weight, parse(spec))
        assert same_bits(found.scale, expected.scale)
        assert same_bits(found.packed, expected.packed)
        for dtype in DTYPES:
            decoded = found.dequantize(dtype)
            assert torch.equal(decoded, by_reference(lambda dtype=dtype: expected.dequantize(dtype)))


@settings(max_examples=200)
@given(
    isa=st.sampled_from(ISAS),
    name=st.sampled_from(NAMES),
    suffix=st.sampled_from(SUFFIXES),
    cols=st.sampled_from(COLS),
    kinds=st.lists(st.sampled_from(list(ROWS)), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_codes_scales_and_decoded_weights_are_the_references(isa, name, suffix, cols, kinds, dtype, seed):
    if not parse(name + suffix).fits(cols):
        return
    values = torch.randn(len(kinds), cols, generator=torch.Generator().manual_seed(seed))
    weight = torch.stack([ROWS[kind](row) for kind, row in zip(kinds, values, strict=True)])
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    weight = weight.clamp(-most, most).to(dtype)
    assert_same(weight, name + suffix, isa)


@pytest.mark.parametrize("spec", ["absmax4", "absmax-ternary", "int4-g128", "int7", "ternary", "codebook3+had256"])
def test_rows_shared_among_threads_are_all_there(spec, isa):
    assert_same(torch.randn(1001, 640, generator=torch.Generator().manual_seed(0)).bfloat16(), spec, isa)


@settings(max_examples=50)
@given(
    isa=st.sampled_from(ISAS), seed=st.integers(0, 999), name=st.sampled_from(NAMES), kind=st.sampled_from(list(ROWS))
)
def test_a_scale_does_not_depend_on_the_order_of_its_weights(isa, name, kind, seed):
    if format_named(name).rule.state_bits:  # a trellis goes by the order
        return
    rng = torch.Generator().manual_seed(seed)
    row = ROWS[kind](torch.randn(640, generator=rng)).unsqueeze(0)
    shuffled = row[:, torch.randperm(640, generator=rng)]
    for computing in (isa, kernels.REFERENCE):
        with computing_with(computing):
            assert same_bits(quantize(row, parse(name)).scale, quantize(shuffled, parse(name)).scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", ["absmax4", "int4", "ternary+had64", "codebook2"])
def test_the_first_row_that_is_not_finite_is_named(spec, bad, dtype, isa):
    weight = torch.randn(2000, 67, generator=torch.Generator().manual_seed(0)).to(dtype)
    for row, col in ((1999, 0), (1700, 66), (1701, 3)):
        weight[row, col] = bad
    with computing_with(isa), pytest.raises(QuantizationError, match=r"NaN or infinity in row 1700$"):
        quantize(weight, parse(spec))


@pytest.mark.parametrize("block", [1, 2, 4, 8, 64, 4096])
@pytest.mark.parametrize("times", [1, 3])
def test_rotations_are_the_references(block, times, isa):
    x = torch.randn(2, 3, block * times, generator=torch.Generator().manual_seed(block))
    for rotate_by in (hadamard.rotate, hadamard.unrotate):
        expected = by_reference(lambda rotate_by=rotate_by: rotate_by(x, block))
        with computing_with(isa):
            assert torch.equal(rotate_by(x, block), expected)
            assert torch.equal(rotate_by(x.mT.contiguous().mT, block), expected)


def test_a_gradient_goes_through_the_rotation(isa):
    x = torch.randn(3, 16, requires_grad=True)
    with computing_with(isa):
        hadamard.rotate(x, 16).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_buffers_at_odd_addresses_are_read(isa):
    weight = torch.randn(3, 40)
    odd = torch.empty(weight.nbytes + 1, dtype=torch.uint8)
    odd[1:] = weight.view(torch.uint8).flatten()
    moved = torch.frombuffer(odd.numpy(), dtype=torch.float32, count=120, offset=1).view(3, 40)
    with computing_with(isa):
        assert torch.equal(quantize(moved, parse("int4")).packed, quantize(weight, parse("int4")).packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(3, 19, dtype=torch.uint8)}, r"packed is torch.uint8 \[3, 19\], expected .* 20\]"),
        ({"packed": torch.zeros(3, 20, dtype=torch.int8)}, "packed is torch.int8"),
        ({"scale": torch.zeros(2, 1, dtype=torch.float16)}, r"scale is torch.float16 \[2, 1\], expected .* \[3,"),
        ({"scale": torch.zeros(3, 1)}, "scale is torch.float32"),
        ({"cols": 0}, "for 0 columns, 1 or more"),
    ],
)
def test_stored_buffers_that_do_not_fit_are_refused(change, message, isa):
    stored = quantize(torch.ones(3, 40), parse("int4"))
    parts = {"packed": stored.packed, "scale": stored.scale, "cols": 40, "spec": parse("int4")} | change
    with computing_with(isa), pytest.raises(KernelError, match=message):
        GroupedMatrix(**parts).dequantize()


@pytest.mark.parametrize(("block", "signs"), [(3, 12), (16, 24), (4, 11), (0, 12)])
def test_rotations_that_do_not_fit_are_refused(block, signs, isa):
    with computing_with(isa), pytest.raises(KernelError, match="rows of"):
        rotate(torch.ones(2, 24 if block == 16 else 12), Rotation(block, torch.ones(signs)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e35])
def test_rotating_keeps_what_is_not_finite_and_what_is_huge(value, isa):
    x = torch.ones(2, 64)
    x[1, 5] = value
    with computing_with(isa):
        rotated = hadamard.rotate(x, 64)
    expected = hadamard.rotate(x.double(), 64)
    assert torch.equal(rotated[0], expected[0].float())
    assert torch.equal(rotated[1].isfinite(), expected[1].isfinite())
    if math.isfinite(value):
        torch.testing.assert_close(rotated.double(), expected)


@pytest.mark.skipif(ISAS == [kernels.REFERENCE], reason="no native module")
def test_what_is_in_no_memory_of_this_process_is_refused(isa):
    with computing_with(isa), pytest.raises(QuantizationError, match="a tensor on meta"):
        quantize(torch.empty(4, 64, device="meta"), parse("int4"))
