"""What computes is a value, and all that can compute give the same bits."""

import pickle

import pytest
import torch

from epic_quant.errors import KernelError
from epic_quant.kernels import isas
from epic_quant.quant import backends, format_named, hadamard, linear
from epic_quant.spec import FORMATS

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
    assert {name for name, device in backends.BACKENDS if device == "cpu"} == rules
