"""The matrix product that takes plain and quantized weights."""

import pytest
import torch

from epic_quant.errors import QuantizationError, SpecError
from epic_quant.kernels import isas
from epic_quant.quant import linear

from .conftest import stored


@pytest.fixture
def weight():
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_plain_weight_is_cast_to_the_input(x, weight, dtype):
    product = linear(x.to(dtype), weight.bfloat16())
    assert product.dtype == dtype
    assert torch.equal(product, x.to(dtype) @ weight.bfloat16().to(dtype).T)


@pytest.mark.parametrize("backend", isas())
@pytest.mark.parametrize(
    "spec", ["bf16", "ternary", "int5", "int4-g32", "codebook3+had64", "int8+had16", "absmax3-packed", "q8_0", "iq4_nl"]
)
def test_a_stored_weight_multiplies_as_its_decoded_form(x, weight, spec, backend, monkeypatch):
    quantized = stored(weight, spec, backend=backend)
    for module in ("grouped", "plain", "ggml.types"):
        monkeypatch.setattr(f"epic_quant.quant.{module}._CHUNK", 10 * 64)
    product = linear(x, quantized)
    assert product.shape == (2, 3, 48)
    torch.testing.assert_close(product, x @ quantized.dequantize().T, atol=1e-4, rtol=1e-4)
    assert linear(x.double(), quantized).dtype == torch.float64
    assert quantized.computed_by() in ("reference", f"{backend}, fp32 activations")


def test_unknown_activations_are_refused(x, weight):
    with pytest.raises(SpecError, match="unknown activations 'fp3'; did you mean fp32"):
        linear(x, weight, activations="fp3")


@pytest.mark.parametrize("spec", [None, "int4"])
def test_inner_dims_must_agree(x, weight, spec):
    other = weight[:, :32] if spec is None else stored(weight[:, :32], spec)
    with pytest.raises(QuantizationError, match="rows of 64, but the weight has rows of 32"):
        linear(x, other)
