"""What computes is a value, and all that can compute give the same bits."""

import pickle

import pytest
import torch

from epic_quant.errors import KernelError
from epic_quant.kernels import isas
from epic_quant.quant import backends, format_named, from_tensors, hadamard, linear
from epic_quant.spec import FORMATS, WeightSpec

from .conftest import same_tensors, stored

WEIGHT = torch.randn(33, 256, generator=torch.Generator().manual_seed(0))
every_backend = pytest.mark.parametrize("backend", isas())


@every_backend
@pytest.mark.parametrize("name", FORMATS)
def test_every_backend_stores_and_decodes_the_same_bits(name, backend):
    suffix = "-g64+had128" if FORMATS[name].has_groups else ""
    expected = stored(WEIGHT, name + suffix, backend="reference")
    found = stored(WEIGHT, name + suffix, backend=backend)
    assert same_tensors(found, expected)
    assert torch.equal(found.dequantize(), expected.dequantize())


@every_backend
def test_a_matrix_keeps_its_backend_and_names_it(backend):
    matrix = stored(WEIGHT, "int4-g32", backend=backend)
    expected = "reference" if backend == "reference" else f"{backend}, int8 activations"
    for one in (matrix, matrix.rows(torch.tensor([3, 1])), pickle.loads(pickle.dumps(matrix))):
        assert one.computed_by("int8") == expected
    x = torch.ones(2, 256)
    torch.testing.assert_close(linear(x, matrix), x @ matrix.dequantize().T, rtol=1e-4, atol=1e-4)


@every_backend
def test_every_backend_rotates_to_the_same_bits(backend):
    expected = hadamard.rotate(WEIGHT, 64, "reference")
    assert torch.equal(hadamard.rotate(WEIGHT, 64, backend), expected)
    assert torch.equal(hadamard.unrotate(expected, 64, backend), hadamard.unrotate(expected, 64, "reference"))


def test_without_a_choice_it_is_the_default():
    assert stored(WEIGHT, "int4").computed_by() == stored(WEIGHT, "int4", backend=backends.default()).computed_by()


def test_a_backend_that_is_not_here_is_refused():
    with pytest.raises(KernelError, match="no backend 'avx1024'; this machine has: "):
        stored(WEIGHT, "int4", backend="avx1024")


def test_the_formats_with_kernels_in_memory_are_those_that_have_a_rule():
    rules = {name for name, info in FORMATS.items() if info.has_groups and format_named(name).rule is not None}
    found = {name for name, device in backends.BACKENDS if device == "cpu"}
    assert found - {"q8_0", "q6_k", "q4_k"} == rules


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["q8_0", "q6_k", "q4_k"])
def test_any_bytes_decode_to_the_same_bits(name, dtype, backend):
    """Scales that are infinite or NaN among them."""
    nbytes = 4 * FORMATS[name].block_nbytes
    blocks = torch.randint(0, 256, (2000, nbytes), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    blocks[:100] |= 0x7C
    expected, found = (
        from_tensors(
            WeightSpec(name), {"blocks": blocks}, (2000, 4 * FORMATS[name].block_size), backend=one
        ).dequantize(dtype)
        for one in ("reference", backend)
    )
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
