"""Products with stored matrices, against decoded weights in fp64."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_quant import kernels
from epic_quant.errors import KernelError
from epic_quant.kernels.matrix import Format, NativeMatrix, Rotation
from epic_quant.quant import format_named, from_tensors, hadamard, linear, quantize
from epic_quant.spec import FORMATS, WeightSpec

parse = WeightSpec.parse

# Every scheme whose codes a kernel knows, over a whole row and in groups: of several blocks, one, half a step, and such
# as no step of a kernel falls in with.
GROUPS = ("", "-g16", "-g32", "-g64", "-g80", "-g128", "-g160", "-g384", "-g10")
CODINGS = {"bits2", "bits3", "bits4", "bits8", "trits", *(f"trellis{bits}" for bits in range(1, 5))}
RULES = {name: format_named(name).rule for name, info in FORMATS.items() if info.has_groups}
KNOWN = [name for name, rule in RULES.items() if rule is not None and rule.coding in CODINGS]
# ggml's types that kernels know, whose blocks hold their scales.
BLOCKS = {name: Format(name, format_named(name).levels.values) for name in ("q8_0", "q6_k", "q4_k")}
SPECS = [*(f"{name}{group}" for name in KNOWN for group in GROUPS), *BLOCKS]
ISAS = kernels.isas()[:-1]


def no_scales(rows):
    return torch.empty(rows, 0, dtype=torch.float16)


def matrix_of(quantized, isa):
    chosen = quantized.spec
    if chosen.format in BLOCKS:
        rows, cols = quantized.shape
        return NativeMatrix(BLOCKS[chosen.format], quantized.blocks, no_scales(rows), cols, isa=isa)
    block = chosen.hadamard_block
    rotation = hadamard.rotation(quantized.cols, block) if block else None
    return NativeMatrix(RULES[chosen.format], quantized.packed, quantized.scale, quantized.cols, rotation, isa)


def error(product, x, quantized):
    """‖product - x Wᵀ‖ over what it is for x and W without direction, ‖x‖ ‖W‖ / √cols."""
    weight = replace(quantized, backend=kernels.REFERENCE).dequantize(torch.float64)
    expected = x.double() @ weight.T
    size = x.double().norm() * weight.norm() / math.sqrt(quantized.shape[1])
    return float((product.double() - expected).norm() / size) if size else float((product - expected).abs().max())


@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=5, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 5, 16, 31, 127]),
    groups=st.integers(1, 5),
    cols=st.sampled_from([1, 2, 31, 127, 256, 640, 1281, 2561]),
    tokens=st.sampled_from([1, 2, 3, 4, 7, 27, 50]),
    seed=st.integers(0, 1000),
)
def test_products_are_those_of_decoded_weights(spec, activations, rows, groups, cols, tokens, seed):
    chosen = parse(spec)
    if chosen.group_size or chosen.format in BLOCKS:
        cols = groups * (chosen.group_size or chosen.info.block_size)
    generator = torch.Generator().manual_seed(seed)
    quantized = quantize(torch.randn(rows, cols, generator=generator), chosen)
    x = torch.randn(tokens, cols, generator=generator)
    if activations == "int8":
        # Nothing is left to round in whole numbers up to 127, where every block has the largest; none begins at an odd
        # number.
        x = (x * 40).round().clamp(-127, 127)
        x[:, ::2] = 127
    for isa in ISAS:
        product = matrix_of(quantized, isa).matmul(x, activations)
        assert product.shape == (tokens, rows)
        assert error(product, x, quantized) < 1e-5


@pytest.mark.parametrize("spec", ["int4-g32+had128", "codebook3+had2", "ternary+had1", "int8+had16"])
@pytest.mark.parametrize("cols", [16, 640, 1282])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_activations_are_rotated_as_the_rows_are(isa, spec, cols, tokens):
    generator = torch.Generator().manual_seed(cols)
    if not parse(spec).fits(cols):
        return
    quantized = quantize(torch.randn(19, cols, generator=generator), parse(spec))
    x = torch.randn(tokens, cols, generator=generator)
    given = x.clone()
    assert error(matrix_of(quantized, isa).matmul(x), x, quantized) < 1e-5
    assert torch.equal(x, given)


@pytest.mark.parametrize(
    "spec", ["int4-g128", "int3", "int8-g32", "ternary", "codebook3-g128", "absmax3-packed", *BLOCKS]
)
def test_int8_activations_cost_less_than_a_hundredth(isa, spec):
    generator = torch.Generator().manual_seed(0)
    quantized = quantize(torch.randn(512, 2560, generator=generator), parse(spec))
    x = torch.randn(3, 2560, generator=generator)
    for tokens in (1, 3):
        product = matrix_of(quantized, isa).matmul(x[:tokens], "int8")
        assert 1e-3 < error(product, x[:tokens], quantized) < 0.01


@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_codes_at_both_ends_do_not_overflow(isa, activations):
    for spec in ("int2", "int3", "int4", "int8", "ternary", "codebook2", "codebook3", "codebook4"):
        low, high = min(RULES[spec].levels), max(RULES[spec].levels)
        for level in (low, high):
            weight = torch.full((5, 512), float(level)) * 2**-10
            weight[:, 0] = low * 2**-10
            quantized = quantize(weight, parse(spec))
            for x in (torch.full((2, 512), 3.0), torch.full((2, 512), -3.0)):
                for tokens in (1, 2):
                    product = matrix_of(quantized, isa).matmul(x[:tokens], activations)
                    expected = x[:tokens].double() @ quantized.dequantize(torch.float64).T
                    torch.testing.assert_close(product.double(), expected, rtol=2e-6, atol=1e-6)


@settings(max_examples=40, derandomize=True)
@given(
    data=st.data(),
    blocks=st.integers(1, 9),
    rows=st.sampled_from([1, 4, 19]),
    tokens=st.sampled_from([1, 2, 5, 17]),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("name", BLOCKS)
def test_any_blocks_multiply_as_they_decode(name, activations, data, blocks, rows, tokens, seed):
    """Any codes and multiples of scales, those at the ends more often, with scales that are finite."""
    info, rng = FORMATS[name], np.random.default_rng(seed)
    drawn = rng.integers(0, 256, (rows, blocks, info.block_nbytes), dtype=np.uint8)
    byte = st.sampled_from([0x00, 0x7F, 0x80, 0xFF, 0xF0, 0x3F])
    for row in range(0, rows, 2):
        drawn[row, :, data.draw(st.integers(0, 207)) :] = data.draw(byte)
    for at in {"q8_0": [0], "q6_k": [208], "q4_k": [0, 2]}[name]:
        scales = (rng.standard_normal((rows, blocks)) * 0.01).astype(np.float16)
        drawn[:, :, at : at + 2] = scales[..., None].view(np.uint8)
    shape = rows, blocks * info.block_size
    quantized = from_tensors(parse(name), {"blocks": torch.from_numpy(drawn.reshape(rows, -1))}, shape)
    x = torch.from_numpy(rng.integers(-127, 128, (tokens, shape[1]))).float()
    x[:, ::2] = 127
    for isa in ISAS:
        assert error(matrix_of(quantized, isa).matmul(x, activations), x, quantized) < 1e-5


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("spec", ["int4-g64", *BLOCKS])
def test_zeros_tiny_numbers_outliers_and_nan(isa, spec, activations, tokens):
    quantized = quantize(torch.randn(9, 256, generator=torch.Generator().manual_seed(0)), parse(spec))
    matrix = matrix_of(quantized, isa)
    assert torch.equal(matrix.matmul(torch.zeros(tokens, 256), activations), torch.zeros(tokens, 9))
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1))
    assert error(matrix.matmul(x * 1e-20, activations), x * 1e-20, quantized) < 0.02
    assert error(matrix.matmul(x * 1e20, activations), x * 1e20, quantized) < 0.02
    assert matrix.matmul(x * 1e-36, activations).abs().max() < 1e-32
    x[0, 7] = 1e6
    assert error(matrix.matmul(x, activations), x, quantized) < 0.02
    for bad in (math.nan, math.inf):
        x[0, 7] = bad
        product = matrix.matmul(x, activations)
        assert not product[0].isfinite().any()
        assert product[1:].isfinite().all()


@pytest.mark.parametrize("spec", ["int4-g128", *BLOCKS])
def test_the_numbers_do_not_depend_on_threads_or_on_other_rows(isa, spec):
    """A row's product is the same alone, among others, and on one thread."""
    quantized = quantize(torch.randn(999, 256, generator=torch.Generator().manual_seed(0)), parse(spec))
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1))
    together = matrix_of(quantized, isa).matmul(x)
    torch.set_num_threads(1)
    alone = matrix_of(quantized, isa).matmul(x)
    torch.set_num_threads(2)
    assert torch.equal(together, alone)
    ids = torch.tensor([998, 5, 5])
    assert torch.equal(matrix_of(quantized.rows(ids), isa).matmul(x), together[:, ids])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shapes_and_dtypes_are_those_of_the_input(isa, dtype):
    quantized = quantize(torch.randn(9, 128, generator=torch.Generator().manual_seed(0)), parse("int4-g64"))
    x = torch.randn(128, 2, 3, generator=torch.Generator().manual_seed(1)).to(dtype).permute(1, 2, 0)
    product = matrix_of(quantized, isa).matmul(x)
    assert product.shape == (2, 3, 9)
    assert product.dtype == dtype
    expected = x.float() @ quantized.dequantize().T
    torch.testing.assert_close(product.float(), expected, atol=0.05, rtol=0.01)


def test_misaligned_input_is_taken_from_a_copy(isa):
    quantized = quantize(torch.randn(3, 128, generator=torch.Generator().manual_seed(0)), parse("int4-g64"))
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(1))
    bytes_ = bytearray(1 + x.nbytes)
    bytes_[1:] = x.numpy().tobytes()
    misaligned = torch.frombuffer(bytes_, dtype=torch.float32, offset=1, count=128).view(1, 128)
    assert misaligned.data_ptr() % 4
    assert torch.equal(matrix_of(quantized, isa).matmul(misaligned), matrix_of(quantized, isa).matmul(x))


def test_a_matrix_can_be_pickled(isa):
    quantized = quantize(torch.randn(3, 128, generator=torch.Generator().manual_seed(0)), parse("codebook4+had32"))
    matrix, x = matrix_of(quantized, isa), torch.ones(1, 128)
    assert torch.equal(pickle.loads(pickle.dumps(matrix)).matmul(x), matrix.matmul(x))


def test_a_matrix_of_no_rows_gives_empty_products(isa):
    none = quantize(torch.ones(4, 64), parse("int4")).rows(torch.arange(0))
    assert matrix_of(none, isa).matmul(torch.ones(2, 64)).shape == (2, 0)
    assert matrix_of(none, isa).dequantize().shape == (0, 64)


INT4 = Format("bits4", tuple(range(-8, 8)), gaussian_step=0.3352, peak_level=8, either_sign=True)
BAD = {
    "short rows": (
        {"packed": torch.zeros(4, 31, dtype=torch.uint8)},
        "packed is torch.uint8 \\[4, 31\\], expected .* 32",
    ),
    "other dtype": ({"packed": torch.zeros(4, 32, dtype=torch.int8)}, "packed is torch.int8"),
    "one dim": ({"packed": torch.zeros(32, dtype=torch.uint8)}, "packed is torch.uint8 \\[32\\]"),
    "scale in fp32": ({"scale": torch.zeros(4, 1)}, "scale is torch.float32"),
    "scales of fewer rows": ({"scale": torch.zeros(3, 1, dtype=torch.float16)}, "scale is torch.float16 \\[3, 1\\]"),
    "no scales": ({"scale": torch.zeros(4, 0, dtype=torch.float16)}, "0 scales a row do not divide"),
    "groups that do not divide": ({"scale": torch.zeros(4, 3, dtype=torch.float16)}, "3 scales a row do not divide"),
    "no columns": ({"cols": 0}, "for 0 columns, 1 or more"),
    "another coding": ({"format": replace(INT4, coding="bits9")}, "no kernel knows the coding 'bits9'"),
    "too many levels": ({"format": replace(INT4, levels=tuple(range(17)))}, "17 levels for bits4, expected up to 16"),
    "levels beyond a byte": ({"format": replace(INT4, levels=tuple(range(120, 136)))}, "16 levels for bits4, expected"),
    "levels out of order": (
        {"format": replace(INT4, levels=(1, 0))},
        "2 levels for bits4, expected up to 16 ascending",
    ),
    "uneven levels": ({"format": replace(INT4, levels=(-1, 0, 2))}, "levels of bits4 are -1 to 2 unevenly"),
    "an even table": ({"format": replace(INT4, rounding="table")}, "levels of bits4 are -8 to 7 evenly"),
    "a table of five": ({"format": replace(INT4, levels=(0, 1, 2, 3, 5), rounding="table")}, "a table of 5 levels"),
    "a table from -128": ({"format": replace(INT4, levels=(-128, 0, 1, 2), rounding="table")}, "levels from -128"),
    "int8 from elsewhere": ({"format": Format("bits8", (0, 1))}, "levels of bits8 are from 0 on, expected -128"),
    "scales beside blocks": (
        {"format": BLOCKS["q4_k"], "packed": torch.zeros(4, 144, dtype=torch.uint8), "cols": 256},
        "1 scales a row for rows of 256 in q4_k, expected none beside blocks of 256",
    ),
    "a part of a block": (
        {
            "format": BLOCKS["q6_k"],
            "packed": torch.zeros(4, 210, dtype=torch.uint8),
            "scale": no_scales(4),
            "cols": 384,
        },
        "0 scales a row for rows of 384 in q6_k, expected none beside blocks of 256",
    ),
    "too few bytes of blocks": (
        {"format": BLOCKS["q8_0"], "scale": no_scales(4)},
        "packed is torch.uint8 \\[4, 32\\], expected .* 68",
    ),
    "a table of blocks": (
        {"format": replace(BLOCKS["q4_k"], levels=(0, 1, 2, 4), rounding="table")},
        "a table of 4 levels",
    ),
    "unknown isa": ({"isa": "avx3"}, "no kernels for 'avx3'; this machine has"),
    "another block": ({"rotation": Rotation(128, torch.ones(64))}, "a block of 128 does not divide rows of 64"),
    "other signs": ({"rotation": Rotation(64, torch.ones(63))}, "the signs do not fit rows of 64"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(isa, case):
    changes, message = BAD[case]
    arguments = {
        "format": INT4,
        "packed": torch.zeros(4, 32, dtype=torch.uint8),
        "scale": torch.zeros(4, 1, dtype=torch.float16),
        "cols": 64,
        "isa": isa,
    }
    NativeMatrix(**arguments)
    with pytest.raises(KernelError, match=message):
        NativeMatrix(**arguments | changes)


def test_buffers_that_are_not_contiguous_or_aligned_are_copied(isa):
    quantized = quantize(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), parse("int4-g32"))
    odd = torch.frombuffer(bytearray(1) + quantized.scale.numpy().tobytes(), dtype=torch.float16, offset=1, count=6)
    columns = quantized.packed.T.contiguous().T
    moved = NativeMatrix(RULES[quantized.spec.format], columns, odd.view(3, 2), 64, isa=isa)
    assert torch.equal(moved.dequantize(), quantized.dequantize())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 63), "x is \\[2, 63\\], expected \\[..., 64\\]"),
        (torch.zeros(()), "x is \\[\\]"),
        (torch.zeros(0, 64), "no tokens"),
        (torch.zeros(2, 64, dtype=torch.int32), "x is torch.int32"),
        (torch.zeros(2, 64, device="meta"), "on meta"),
    ],
    ids=["other inner dim", "no dims", "no tokens", "integers", "no memory"],
)
def test_inputs_that_do_not_fit_are_refused(isa, x, message):
    matrix = matrix_of(quantize(torch.ones(4, 64), parse("int4")), isa)
    with pytest.raises(KernelError, match=message):
        matrix.matmul(x)


def test_a_coding_without_kernels_for_products_is_refused(isa):
    matrix = matrix_of(quantize(torch.ones(4, 64), parse("int5")), isa)
    assert not matrix.has_matmul
    with pytest.raises(KernelError, match="no kernel multiplies by codes as bits5"):
        matrix.matmul(torch.zeros(2, 64))


def test_no_kernel_quantizes_to_blocks(isa):
    with pytest.raises(KernelError, match="no kernel quantizes to q4_k"):
        NativeMatrix.quantize(BLOCKS["q4_k"], torch.ones(2, 256), 32, isa=isa)


def test_unknown_activations_are_refused(isa):
    matrix = matrix_of(quantize(torch.ones(4, 64), parse("int4")), isa)
    with pytest.raises(KernelError, match="unknown activations 'int4'"):
        matrix.matmul(torch.zeros(2, 64), "int4")


def test_linear_takes_the_kernels_and_says_so():
    quantized = quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), parse("int4-g32"))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    first = ISAS[:1]
    expected = f"{first[0]}, int8 activations" if first else "reference"
    assert quantized.computed_by("int8") == expected
    assert error(linear(x, quantized, activations="int8"), x, quantized) < 0.02
    assert quantize(torch.ones(2, 8), parse("int5")).computed_by("int8") == "reference"


def test_what_no_kernel_takes_goes_to_the_reference():
    quantized = quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), parse("int4"))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    linear(x, quantized).sum().backward()
    torch.testing.assert_close(x.grad, quantized.dequantize().sum(0).expand(2, -1))
    assert linear(torch.zeros(0, 64), quantized).shape == (0, 8)
    assert linear(x.detach().double(), quantized).dtype == torch.float64
