"""The checklist that every format passes, plain, in groups and rotated, and in blocks."""

import importlib
import math
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from epic_quant.errors import QuantizationError
from epic_quant.metrics import relative_l2
from epic_quant.quant import format_named, from_tensors
from epic_quant.spec import FORMATS, WeightSpec

from .conftest import same_tensors, stored

SCALED = sorted(name for name, info in FORMATS.items() if info.has_groups)
SPECS = [*FORMATS, *(f"{name}-g16" for name in SCALED), *(f"{name}-g32+had64" for name in SCALED)]
every_spec = pytest.mark.parametrize("spec", SPECS)


def whole_blocks(spec, cols):
    """`cols`, or as many more as make whole blocks of the spec's format."""
    block = WeightSpec.parse(spec).info.block_size
    return -(-cols // block) * block


def gaussian(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@every_spec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_shapes_dtypes_and_names(spec, dtype):
    cols = whole_blocks(spec, 64)
    quantized = stored(gaussian(5, cols).to(dtype), spec)
    assert str(quantized.spec) == spec
    assert quantized.shape == (5, cols)
    assert quantized.dequantize().dtype == torch.float32
    assert quantized.dequantize(dtype).shape == (5, cols)
    assert spec in repr(quantized)
    assert quantized.nbytes == sum(
        len(tensor.view(torch.uint8).numpy().tobytes()) for tensor in quantized.tensors().values()
    )
    assert quantized.bits_per_weight == 8 * quantized.nbytes / (5 * cols)


@every_spec
def test_bytes_are_linear_in_rows(spec):
    row, *more = (stored(gaussian(rows, whole_blocks(spec, 96)), spec).nbytes for rows in (1, 2, 5, 13))
    assert more == [2 * row, 5 * row, 13 * row]


@every_spec
def test_rows_are_taken_apart(spec):
    cols = whole_blocks(spec, 96)
    quantized = stored(gaussian(7, cols), spec)
    ids = torch.tensor([6, 0, 0, 3])
    taken = quantized.rows(ids)
    assert taken.shape == (4, cols)
    assert taken.nbytes * 7 == quantized.nbytes * 4
    assert torch.equal(taken.dequantize(), quantized.dequantize()[ids])
    none = quantized.rows(torch.tensor([], dtype=torch.int64))
    assert none.dequantize().shape == (0, cols)
    assert none.matmul(torch.ones(2, 3, cols)).shape == (2, 3, 0)
    assert quantized.matmul(torch.ones(0, cols)).shape == (0, 7)
    with pytest.raises(IndexError):
        quantized.rows(torch.tensor([7]))


@every_spec
def test_a_transposed_view_is_quantized_as_its_copy_is(spec):
    weight = gaussian(whole_blocks(spec, 64), 5).T
    assert same_tensors(stored(weight, spec), stored(weight.contiguous(), spec))


@every_spec
def test_the_same_weight_gives_the_same_bytes_whole_or_row_by_row(spec):
    weight = gaussian(4, whole_blocks(spec, 96))
    whole = stored(weight, spec)
    single = stored(weight[2:3], spec)
    assert same_tensors(whole.rows(torch.tensor([2])), single)


@every_spec
def test_many_chunks_are_as_one(spec, monkeypatch):
    weight = gaussian(9, whole_blocks(spec, 96))
    whole = stored(weight, spec)
    for module in ("grouped", "plain", "ggml.types"):
        monkeypatch.setattr(f"epic_quant.quant.{module}._CHUNK", 200)
    parts = stored(weight, spec)
    assert same_tensors(whole, parts)
    assert torch.equal(whole.dequantize(), parts.dequantize())


@every_spec
def test_zero_and_constant_rows_do_not_disturb_others(spec):
    weight = gaussian(4, whole_blocks(spec, 64))
    weight[1] = 0.0
    weight[2] = -0.25
    decoded = stored(weight, spec).dequantize()
    assert not decoded[1].any()
    alone = stored(weight[[0, 3]], spec).dequantize()
    assert torch.equal(decoded[[0, 3]], alone)
    assert decoded.isfinite().all()


@every_spec
@pytest.mark.parametrize("value", [1e-30, 1e-8, 3e-8, 1e-7, 1e5, 1e20, 3.38e38])
def test_scales_beyond_fp16_never_give_nan_or_infinity(spec, value):
    weight = gaussian(3, whole_blocks(spec, 64))
    weight[1] = weight[1].clamp(-1, 1) * value
    for dtype in (torch.float32, torch.float16):
        decoded = stored(weight, spec).dequantize(dtype)
        assert decoded.isfinite().all()
    assert torch.equal(decoded[0], stored(weight[:1], spec).dequantize(dtype)[0])


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"bf16"}))
def test_a_row_too_small_for_an_fp16_scale_becomes_zeros(name):
    assert not stored(torch.full((1, whole_blocks(name, 8)), 1e-12), name).dequantize().any()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if whole_blocks(spec, 1) == 1])
@pytest.mark.parametrize("cols", [1, 3, 5])
def test_short_rows_and_single_columns(spec, cols):
    weight = gaussian(6, cols)
    decoded = stored(weight, spec).dequantize()
    assert decoded.shape == (6, cols)
    assert relative_l2(decoded, weight) < 0.9


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not re.search("had|codebook|trellis", spec)])
def test_one_huge_outlier_is_kept(spec):
    """Codebooks and trellises have no zero level and are not meant for that; what is rotated has none."""
    weight = gaussian(1, whole_blocks(spec, 64))
    weight[0, 5] = -3000.0
    assert stored(weight, spec).dequantize()[0, 5].item() == pytest.approx(-3000, rel=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", ["bf16", "absmax4", "int4-g32", "ternary+had64", "codebook2", "q4_k", "q8_0"])
def test_nan_and_infinity_name_their_row(spec, bad):
    weight = gaussian(2000, 256)
    weight[1700, 3] = bad
    with pytest.raises(QuantizationError, match="NaN or infinity in row 1700"):
        stored(weight, spec)


def test_a_group_that_does_not_divide_the_row_is_named_with_it():
    with pytest.raises(QuantizationError, match="a group of 48 does not divide rows of 64 weights"):
        stored(torch.ones(2, 64), "int4-g48")


@pytest.mark.parametrize(("spec", "cols", "block"), [("q4_k", 320, 256), ("q8_0", 48, 32), ("tq1_0", 32, 256)])
def test_rows_that_are_no_whole_blocks_are_refused(spec, cols, block):
    message = f"{spec}: rows of {cols} weights are no multiple of {block}"
    with pytest.raises(QuantizationError, match=message):
        stored(torch.ones(2, cols), spec)
    with pytest.raises(QuantizationError, match=message):
        from_tensors(WeightSpec.parse(spec), {"blocks": torch.zeros(2, 34, dtype=torch.uint8)}, (2, cols))


@pytest.mark.parametrize(
    "weight", [torch.ones(4), torch.ones(2, 2, 2), torch.ones(0, 4), torch.ones(2, 2, dtype=torch.int64)]
)
def test_what_is_no_matrix_of_floats_is_refused(weight):
    with pytest.raises(QuantizationError, match="no matrix of floats"):
        stored(weight, "int4")


def test_a_row_shorter_than_the_group_is_one_group():
    weight = gaussian(3, 24)
    short, whole = stored(weight, "int4-g32"), stored(weight, "int4")
    assert same_tensors(short, whole)


@pytest.mark.parametrize("spec", ["bf16", "absmax-ternary", "absmax4", "ternary", "ternary-g16"])
def test_quantizing_what_was_decoded_changes_nothing(spec):
    once = stored(gaussian(4, 64), spec).dequantize()
    assert torch.equal(stored(once, spec).dequantize(), once)


def test_bf16_keeps_bf16_weights():
    weight = gaussian(3, 7).bfloat16()
    quantized = stored(weight, "bf16")
    assert torch.equal(quantized.dequantize(torch.bfloat16), weight)
    assert quantized.bits_per_weight == 16


@pytest.mark.parametrize(("cols", "used"), [(512, "int4+had256"), (96, "int4+had32"), (7, "int4+had1")])
def test_the_result_names_the_hadamard_block_that_was_used(cols, used):
    quantized = stored(torch.ones(2, cols), "int4+had256")
    assert str(quantized.spec) == used
    assert stored(torch.ones(2, cols), used).spec == quantized.spec


@every_spec
def test_a_matrix_reads_back_from_a_safetensors_file(spec, tmp_path):
    quantized = stored(gaussian(6, whole_blocks(spec, 96)), spec)
    save_file(quantized.tensors(), tmp_path / "matrix.safetensors")
    again = from_tensors(WeightSpec.parse(spec), load_file(tmp_path / "matrix.safetensors"), quantized.shape)
    assert again.spec == quantized.spec
    assert again.nbytes == quantized.nbytes
    assert same_tensors(again, quantized)
    assert torch.equal(again.dequantize(), quantized.dequantize())
    pickled = pickle.loads(pickle.dumps(quantized))
    assert pickled.spec == quantized.spec
    assert same_tensors(pickled, quantized)


@pytest.mark.parametrize("spec", ["bf16", "int4-g32", "q5_0"])
def test_tensors_that_are_not_what_a_format_stores_are_refused(spec):
    parsed, quantized = WeightSpec.parse(spec), stored(gaussian(6, 96), spec)
    name, tensor = next(iter(quantized.tensors().items()))
    wrong = [{}, quantized.tensors() | {"more": tensor}, quantized.tensors() | {name: tensor[:5]}]
    for tensors in [*wrong, quantized.tensors() | {name: tensor.float()}]:
        with pytest.raises(QuantizationError, match=rf"\[6, 96\] in {spec} is stored as {name} torch"):
            from_tensors(parsed, tensors, (6, 96))


@pytest.mark.parametrize("name", [name for name in SCALED if FORMATS[name].state_bits])
def test_a_trellis_row_says_what_it_does(name):
    """Levels: what can follow a state, at one scale; and state bits are those that it has tables for."""
    info = FORMATS[name]
    assert type(format_named(name)).__module__ == f"epic_quant.quant.{info.module}"
    for state_bits in info.state_bits:
        chosen = format_named(name).with_options(WeightSpec(name, state_bits=state_bits))
        assert len(chosen.values) == 2**state_bits
        assert max(len(each.unique()) for each in chosen.values.view(-1, info.num_levels)) == info.num_levels


@pytest.mark.parametrize("name", [name for name in SCALED if not FORMATS[name].state_bits])
def test_a_formats_row_says_what_it_does(name):
    """Levels: of all codes that packing holds, decoded at one scale, those in reach of any weight."""
    info, codec = FORMATS[name], format_named(name)
    weight = torch.linspace(-1, 1, 4001).unsqueeze(0)
    assert codec.fit(weight).shape == (1, info.scales_per_group)
    zero_point = [-1.0] * (info.scales_per_group - 1)
    values = [
        codec.decode(codec.encode(weight, scale), scale).unique()
        for scale in torch.tensor([[[2 / s, *zero_point]] for s in (2.0, 300.0)])
    ]
    assert max(map(len, values)) == info.num_levels
    assert type(codec).__module__ == f"epic_quant.quant.{info.module}"


def test_a_plain_formats_row_says_what_it_does():
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).unsqueeze(0)
    finite = every[every.isfinite()].unsqueeze(0)
    quantized = stored(finite, "bf16")
    assert torch.equal(quantized.dequantize(torch.bfloat16).view(torch.int16), finite.view(torch.int16))
    assert FORMATS["bf16"].num_levels == every.numel()
    assert FORMATS["bf16"].is_plain
    assert quantized.nbytes == 2 * finite.numel()


def test_every_implemented_format_has_a_row():
    modules = [importlib.import_module(f"epic_quant.quant.{module}") for module in {i.module for i in FORMATS.values()}]
    assert sorted(codec.name for module in modules for codec in module.FORMATS) == sorted(FORMATS)
