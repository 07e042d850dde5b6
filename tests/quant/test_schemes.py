"""The checklist that every scheme passes, plain, grouped and turned."""

import math

import pytest
import torch

from epic_quant.errors import QuantizationError
from epic_quant.metrics import relative_l2
from epic_quant.quant import SCHEMES, quantizer

SCALED = sorted(set(SCHEMES) - {"bf16"})
SPECS = [*SCHEMES, *(f"{name}-g16" for name in SCALED), *(f"{name}-g32+had64" for name in SCALED)]
every_spec = pytest.mark.parametrize("spec", SPECS)


def gaussian(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@every_spec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_shapes_dtypes_and_names(spec, dtype):
    quantized = quantizer(spec).quantize(gaussian(5, 64).to(dtype))
    assert quantized.spec == spec
    assert quantized.shape == (5, 64)
    assert quantized.dequantize().dtype == torch.float32
    assert quantized.dequantize(dtype).shape == (5, 64)
    assert spec in repr(quantized)
    assert quantized.nbytes == len(quantized.packed.numpy().tobytes()) + len(quantized.scale.numpy().tobytes())
    assert quantized.bits_per_weight == 8 * quantized.nbytes / (5 * 64)


@every_spec
def test_bytes_are_linear_in_rows(spec):
    row, *more = (quantizer(spec).quantize(gaussian(rows, 96)).nbytes for rows in (1, 2, 5, 13))
    assert more == [2 * row, 5 * row, 13 * row]


@every_spec
def test_rows_are_taken_apart(spec):
    quantized = quantizer(spec).quantize(gaussian(7, 96))
    ids = torch.tensor([6, 0, 0, 3])
    taken = quantized.rows(ids)
    assert taken.shape == (4, 96)
    assert taken.nbytes * 7 == quantized.nbytes * 4
    assert torch.equal(taken.dequantize(), quantized.dequantize()[ids])
    assert quantized.rows(torch.tensor([], dtype=torch.int64)).dequantize().shape == (0, 96)
    with pytest.raises(IndexError):
        quantized.rows(torch.tensor([7]))


@every_spec
def test_a_transposed_view_is_quantized_as_its_copy_is(spec):
    weight = gaussian(64, 5).T
    assert torch.equal(quantizer(spec).quantize(weight).packed, quantizer(spec).quantize(weight.contiguous()).packed)


@every_spec
def test_the_same_weight_gives_the_same_bytes_whole_or_row_by_row(spec):
    weight = gaussian(4, 96)
    whole = quantizer(spec).quantize(weight)
    single = quantizer(spec).quantize(weight[2:3])
    assert torch.equal(whole.packed[2:3], single.packed)
    assert torch.equal(whole.scale[2:3], single.scale)


@every_spec
def test_many_chunks_are_as_one(spec, monkeypatch):
    weight = gaussian(9, 96)
    whole = quantizer(spec).quantize(weight)
    monkeypatch.setattr("epic_quant.quant.base._CHUNK", 200)
    parts = quantizer(spec).quantize(weight)
    assert torch.equal(whole.packed, parts.packed)
    assert torch.equal(whole.dequantize(), parts.dequantize())


@every_spec
def test_zero_and_constant_rows_do_not_disturb_others(spec):
    weight = gaussian(4, 64)
    weight[1] = 0.0
    weight[2] = -0.25
    decoded = quantizer(spec).quantize(weight).dequantize()
    assert torch.equal(decoded[1], torch.zeros(64))
    alone = quantizer(spec).quantize(weight[[0, 3]]).dequantize()
    assert torch.equal(decoded[[0, 3]], alone)
    assert decoded.isfinite().all()


@every_spec
@pytest.mark.parametrize("value", [1e-30, 1e-8, 3e-8, 1e-7, 1e5, 1e20, 3.38e38])
def test_scales_beyond_fp16_never_give_nan_or_infinity(spec, value):
    weight = gaussian(3, 64)
    weight[1] = weight[1].clamp(-1, 1) * value
    for dtype in (torch.float32, torch.float16):
        decoded = quantizer(spec).quantize(weight).dequantize(dtype)
        assert decoded.isfinite().all()
    assert torch.equal(decoded[0], quantizer(spec).quantize(weight[:1]).dequantize(dtype)[0])


@pytest.mark.parametrize("name", SCALED)
def test_a_row_too_small_for_an_fp16_scale_becomes_zeros(name):
    decoded = quantizer(name).quantize(torch.full((1, 8), 1e-12)).dequantize()
    assert torch.equal(decoded, torch.zeros(1, 8))


@every_spec
@pytest.mark.parametrize("cols", [1, 3, 5])
def test_short_rows_and_single_columns(spec, cols):
    weight = gaussian(6, cols)
    decoded = quantizer(spec).quantize(weight).dequantize()
    assert decoded.shape == (6, cols)
    assert relative_l2(decoded, weight) < 0.9


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "had" not in spec and "codebook" not in spec])
def test_one_huge_outlier_is_kept(spec):
    """Codebooks have no zero level and are not meant for that; what is turned has no outliers."""
    weight = gaussian(1, 64)
    weight[0, 5] = -3000.0
    assert quantizer(spec).quantize(weight).dequantize()[0, 5].item() == pytest.approx(-3000, rel=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", ["bf16", "absmax4", "int4-g32", "ternary+had64", "codebook2"])
def test_nan_and_infinity_name_their_row(spec, bad):
    weight = gaussian(2000, 256)
    weight[1700, 3] = bad
    with pytest.raises(QuantizationError, match="NaN or infinity in row 1700"):
        quantizer(spec).quantize(weight)


def test_a_group_that_does_not_divide_the_row_is_named_with_it():
    with pytest.raises(QuantizationError, match="a group of 48 does not divide a row of 64"):
        quantizer("int4-g48").quantize(torch.ones(2, 64))


@pytest.mark.parametrize(
    "weight", [torch.ones(4), torch.ones(2, 2, 2), torch.ones(0, 4), torch.ones(2, 2, dtype=torch.int64)]
)
def test_what_is_no_matrix_of_floats_is_refused(weight):
    with pytest.raises(QuantizationError, match="no matrix of floats"):
        quantizer("int4").quantize(weight)


def test_a_row_shorter_than_the_group_is_one_group():
    weight = gaussian(3, 24)
    short, whole = quantizer("int4-g32").quantize(weight), quantizer("int4").quantize(weight)
    assert torch.equal(short.packed, whole.packed)
    assert torch.equal(short.scale, whole.scale)


@pytest.mark.parametrize("spec", ["bf16", "absmax-ternary", "absmax4", "ternary", "ternary-g16"])
def test_quantizing_what_was_decoded_changes_nothing(spec):
    once = quantizer(spec).quantize(gaussian(4, 64)).dequantize()
    assert torch.equal(quantizer(spec).quantize(once).dequantize(), once)


def test_bf16_keeps_bf16_weights():
    weight = gaussian(3, 7).bfloat16()
    quantized = quantizer("bf16").quantize(weight)
    assert torch.equal(quantized.dequantize(torch.bfloat16), weight)
    assert quantized.bits_per_weight == 16
