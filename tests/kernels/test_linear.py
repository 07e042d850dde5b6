"""Products with packed weights, against decoded weights in fp64."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_quant import kernels
from epic_quant.errors import KernelError
from epic_quant.kernels import PackedMatrix
from epic_quant.quant import SCHEMES, linear, quantizer

# Every scheme whose codes a kernel knows, over a whole row and in groups: of several blocks, one, half a step, and such
# as no step of a kernel falls in with.
GROUPS = ("", "-g16", "-g32", "-g64", "-g80", "-g128", "-g160", "-g384", "-g10")
CODINGS = {"bits2", "bits3", "bits4", "bits8", "trits"}
KNOWN = [name for name, scheme in SCHEMES.items() if scheme.packing.coding in CODINGS and scheme.levels is not None]
SPECS = [f"{name}{group}" for name in KNOWN for group in GROUPS]
ISAS = kernels.isas()[:-1]


def packed(quantized, isa):
    scheme = quantized.quantizer.scheme
    return PackedMatrix(
        quantized.packed, quantized.scale, quantized.cols, scheme.packing.coding, scheme.levels, isa=isa
    )


def error(product, x, quantized):
    """‖product - x Wᵀ‖ over what it is for x and W without direction, ‖x‖ ‖W‖ / √cols."""
    weight = quantized.dequantize(torch.float64)
    expected = x.double() @ weight.T
    size = x.double().norm() * weight.norm() / math.sqrt(quantized.cols)
    return float((product.double() - expected).norm() / size) if size else float((product - expected).abs().max())


@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 5, 16, 31, 127]),
    groups=st.integers(1, 5),
    cols=st.sampled_from([1, 2, 31, 127, 256, 640, 1281, 2561]),
    tokens=st.sampled_from([1, 2, 3, 4, 7, 27, 50]),
    seed=st.integers(0, 1000),
)
def test_products_are_those_of_decoded_weights(spec, activations, rows, groups, cols, tokens, seed):
    chosen = quantizer(spec)
    if chosen.group_size:
        cols = groups * chosen.group_size
    generator = torch.Generator().manual_seed(seed)
    quantized = chosen.quantize(torch.randn(rows, cols, generator=generator))
    x = torch.randn(tokens, cols, generator=generator)
    if activations == "int8":
        # Nothing is left to round in whole numbers up to 127, where every block has the largest; none begins at an odd
        # number.
        x = (x * 40).round().clamp(-127, 127)
        x[:, ::2] = 127
    for isa in ISAS:
        product = packed(quantized, isa).linear(x, activations)
        assert product.shape == (tokens, rows)
        assert error(product, x, quantized) < 1e-5


@pytest.mark.parametrize("spec", ["int4-g128", "int3", "int8-g32", "ternary", "codebook3-g128", "absmax3-packed"])
def test_int8_activations_cost_less_than_a_hundredth(isa, spec):
    generator = torch.Generator().manual_seed(0)
    quantized = quantizer(spec).quantize(torch.randn(512, 2560, generator=generator))
    x = torch.randn(3, 2560, generator=generator)
    for tokens in (1, 3):
        product = packed(quantized, isa).linear(x[:tokens], "int8")
        assert 1e-3 < error(product, x[:tokens], quantized) < 0.01


@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_codes_at_both_ends_do_not_overflow(isa, activations):
    for spec in ("int2", "int3", "int4", "int8", "ternary", "codebook2", "codebook3", "codebook4"):
        scheme = quantizer(spec).scheme
        low, high = min(scheme.levels), max(scheme.levels)
        for level in (low, high):
            weight = torch.full((5, 512), float(level)) * 2**-10
            weight[:, 0] = low * 2**-10
            quantized = quantizer(spec).quantize(weight)
            for x in (torch.full((2, 512), 3.0), torch.full((2, 512), -3.0)):
                for tokens in (1, 2):
                    product = packed(quantized, isa).linear(x[:tokens], activations)
                    expected = x[:tokens].double() @ quantized.dequantize(torch.float64).T
                    torch.testing.assert_close(product.double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_zeros_tiny_numbers_outliers_and_nan(isa, activations, tokens):
    quantized = quantizer("int4-g64").quantize(torch.randn(9, 256, generator=torch.Generator().manual_seed(0)))
    matrix = packed(quantized, isa)
    assert torch.equal(matrix.linear(torch.zeros(tokens, 256), activations), torch.zeros(tokens, 9))
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1))
    assert error(matrix.linear(x * 1e-20, activations), x * 1e-20, quantized) < 0.02
    assert error(matrix.linear(x * 1e20, activations), x * 1e20, quantized) < 0.02
    assert matrix.linear(x * 1e-36, activations).abs().max() < 1e-32
    x[0, 7] = 1e6
    assert error(matrix.linear(x, activations), x, quantized) < 0.02
    for bad in (math.nan, math.inf):
        x[0, 7] = bad
        product = matrix.linear(x, activations)
        assert not product[0].isfinite().any()
        assert product[1:].isfinite().all()


def test_the_numbers_do_not_depend_on_threads_or_on_who_else_is_there(isa):
    """A row's product is the same alone, among others, and on one thread."""
    quantized = quantizer("int4-g128").quantize(torch.randn(999, 256, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1))
    together = packed(quantized, isa).linear(x)
    torch.set_num_threads(1)
    alone = packed(quantized, isa).linear(x)
    torch.set_num_threads(2)
    assert torch.equal(together, alone)
    ids = torch.tensor([998, 5, 5])
    assert torch.equal(packed(quantized.rows(ids), isa).linear(x), together[:, ids])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shapes_and_dtypes_are_those_of_the_input(isa, dtype):
    quantized = quantizer("int4-g64").quantize(torch.randn(9, 128, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(128, 2, 3, generator=torch.Generator().manual_seed(1)).to(dtype).permute(1, 2, 0)
    product = packed(quantized, isa).linear(x)
    assert product.shape == (2, 3, 9)
    assert product.dtype == dtype
    expected = x.float() @ quantized.dequantize().T
    torch.testing.assert_close(product.float(), expected, atol=0.05, rtol=0.01)


def test_misaligned_input_is_taken_from_a_copy(isa):
    quantized = quantizer("int4-g64").quantize(torch.randn(3, 128, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(1))
    bytes_ = bytearray(1 + x.nbytes)
    bytes_[1:] = x.numpy().tobytes()
    misaligned = torch.frombuffer(bytes_, dtype=torch.float32, offset=1, count=128).view(1, 128)
    assert misaligned.data_ptr() % 4
    assert torch.equal(packed(quantized, isa).linear(misaligned), packed(quantized, isa).linear(x))


def test_a_matrix_can_be_pickled(isa):
    quantized = quantizer("codebook4").quantize(torch.randn(3, 128, generator=torch.Generator().manual_seed(0)))
    matrix, x = packed(quantized, isa), torch.ones(1, 128)
    assert torch.equal(pickle.loads(pickle.dumps(matrix)).linear(x), matrix.linear(x))


BAD = {
    "no rows": ({"packed": torch.zeros(0, 32, dtype=torch.uint8)}, "packed is \\[0, 32\\], expected \\[1 or more, 32"),
    "short rows": ({"packed": torch.zeros(4, 31, dtype=torch.uint8)}, "packed is \\[4, 31\\]"),
    "other dtype": ({"packed": torch.zeros(4, 32, dtype=torch.int8)}, "packed is torch.int8"),
    "one dim": ({"packed": torch.zeros(32, dtype=torch.uint8)}, "packed is torch.uint8 \\[32\\]"),
    "not contiguous": ({"packed": torch.zeros(4, 64, dtype=torch.uint8)[:, ::2]}, "packed is not contiguous"),
    "scale in fp32": ({"scale": torch.zeros(4, 1)}, "scale is torch.float32"),
    "scale misaligned": (
        {"scale": torch.frombuffer(bytearray(9), dtype=torch.float16, offset=1, count=4).view(4, 1)},
        "scale is not contiguous and aligned",
    ),
    "scales of fewer rows": ({"scale": torch.zeros(3, 1, dtype=torch.float16)}, "scale is \\[3, 1\\], expected \\[4,"),
    "no scales": ({"scale": torch.zeros(4, 0, dtype=torch.float16)}, "scale is \\[4, 0\\]"),
    "groups that do not divide": ({"scale": torch.zeros(4, 3, dtype=torch.float16)}, "a divisor of 64"),
    "no columns": ({"cols": 0}, "0 columns"),
    "another coding": ({"coding": "bits5"}, "coding is 'bits5', expected one of bits2"),
    "too many levels": ({"levels": range(17)}, "17 levels for bits4"),
    "levels beyond a byte": ({"levels": range(120, 136)}, "levels for bits4, expected up to 16 in"),
    "uneven trits": ({"coding": "trits", "cols": 160, "levels": (-1, 0, 2)}, "which no kernel has"),
    "unknown isa": ({"isa": "avx3"}, "no kernels for 'avx3'; this machine has"),
}


@pytest.mark.parametrize("case", BAD)
def test_buffers_that_do_not_fit_are_refused(isa, case):
    changes, message = BAD[case]
    arguments = {
        "packed": torch.zeros(4, 32, dtype=torch.uint8),
        "scale": torch.zeros(4, 1, dtype=torch.float16),
        "cols": 64,
        "coding": "bits4",
        "levels": range(-8, 8),
        "isa": isa,
    }
    PackedMatrix(**arguments)
    with pytest.raises(KernelError, match=message):
        PackedMatrix(**arguments | changes)


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
    matrix = packed(quantizer("int4").quantize(torch.ones(4, 64)), isa)
    with pytest.raises(KernelError, match=message):
        matrix.linear(x)


def test_unknown_activations_are_refused(isa):
    matrix = packed(quantizer("int4").quantize(torch.ones(4, 64)), isa)
    with pytest.raises(KernelError, match="unknown activations 'int4'"):
        matrix.linear(torch.zeros(2, 64), "int4")


def test_linear_takes_the_kernels_and_says_so():
    quantized = quantizer("int4-g32").quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    first = ISAS[:1]
    expected = f"{first[0]}, int8 activations" if first else "reference"
    assert quantized.computed_by("int8") == expected
    assert error(linear(x, quantized, activations="int8"), x, quantized) < 0.02
    assert quantizer("int5").quantize(torch.ones(2, 8)).computed_by("int8") == "reference"


def test_what_no_kernel_takes_goes_to_the_reference():
    quantized = quantizer("int4").quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    linear(x, quantized).sum().backward()
    torch.testing.assert_close(x.grad, quantized.dequantize().sum(0).expand(2, -1))
    assert linear(torch.zeros(0, 64), quantized).shape == (0, 8)
    assert linear(x.detach().double(), quantized).dtype == torch.float64
