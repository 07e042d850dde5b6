"""Error compensation."""

import math

import pytest
import torch

from epic_quant.errors import QuantizationError
from epic_quant.quant import quantizer
from epic_quant.quant.gptq import inverse_cholesky_factor

ROWS, COLS = 96, 256


@pytest.fixture(scope="module")
def layer():
    """A weight, correlated inputs [n, cols], and their Hessians."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLS, generator=rng)
    mixing = torch.randn(COLS, COLS, generator=rng) * 0.9 ** torch.arange(COLS).unsqueeze(1).div(4)
    inputs = torch.randn(2048, COLS, generator=rng) @ mixing + 0.3 * torch.randn(2048, COLS, generator=rng)
    return weight, inputs, inputs.T @ inputs / len(inputs)


def output_error(spec, layer, hessian):
    weight, inputs, _ = layer
    error = quantizer(spec).quantize(weight, hessian).dequantize() - weight
    return math.sqrt((inputs @ error.T).square().sum() / (inputs @ weight.T).square().sum())


def test_feedback_takes_a_third_off_the_output_error(layer):
    assert output_error("int3-g128+gptq", layer, layer[2]) < 0.66 * output_error("int3-g128", layer, None)


@pytest.mark.parametrize(
    "base",
    [
        "ternary",
        "int2-g32",
        "int4",
        "codebook2-g64",
        "codebook3+had64",
        "absmax4",
        "ternary-g32+had256",
        "int3-g2",
        "affine3-g32",
    ],
)
def test_feedback_works_over_any_scheme(base, layer):
    assert output_error(f"{base}+gptq", layer, layer[2].double()) < 0.9 * output_error(base, layer, None)


@pytest.mark.parametrize("base", ["int4-g32", "ternary", "codebook3-g64"])
def test_feedback_of_uncorrelated_inputs_is_plain_rounding(base, layer):
    plain = quantizer(base).quantize(layer[0])
    fed = quantizer(f"{base}+gptq").quantize(layer[0], torch.eye(COLS))
    assert torch.equal(plain.packed, fed.packed)
    assert torch.equal(plain.scale, fed.scale)
    assert fed.nbytes == plain.nbytes
    assert fed.spec == f"{base}+gptq"


def test_the_factor_is_the_root_of_the_damped_inverse(layer):
    hessian = layer[2].double()
    factor = inverse_cholesky_factor(hessian).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLS)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(COLS).double(), atol=1e-3, rtol=0)
    assert torch.equal(factor, factor.triu())


def test_unused_inputs_and_singular_hessians_are_fine(layer):
    weight, inputs, _ = layer
    few = inputs[:20].clone()
    few[:, 3] = 0.0
    hessian = few.T @ few / len(few)
    decoded = quantizer("int4-g32+gptq").quantize(weight, hessian).dequantize()
    assert (decoded[:, 3] - weight[:, 3]).abs().max() < 0.5
    assert quantizer("int4+gptq").quantize(weight, torch.zeros(COLS, COLS)).dequantize().isfinite().all()


def with_nan(hessian):
    hessian[0, 0] = math.nan
    return hessian


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (None, "needs the Hessians"),
        (torch.eye(8), r"shape \[8, 8\].*\[256, 256\]"),
        (with_nan(torch.eye(COLS)), "NaN"),
        (torch.ones(COLS, COLS).triu(), "not symmetric"),
        (-torch.eye(COLS), "not positive semidefinite"),
    ],
)
def test_hessians_that_do_not_fit_are_told(layer, hessian, message):
    with pytest.raises(QuantizationError, match=message):
        quantizer("int4+gptq").quantize(layer[0], hessian)


def test_rows_do_not_touch_each_other(layer):
    weight, _, hessian = layer
    spec = quantizer("int4-g32+gptq")
    others = torch.arange(ROWS) % 7 != 3
    changed = torch.where(others.unsqueeze(1), weight.flip(0) * 3, weight)
    whole, again = (spec.quantize(one, hessian).dequantize() for one in (weight, changed))
    assert torch.equal(whole[~others], again[~others])
    assert not torch.equal(whole[others], again[others])


def test_many_chunks_are_as_one_but_for_the_rounding_of_sums(layer, monkeypatch):
    """Matrix products of other shapes may add up in another order, and a code on the edge may then fall elsewhere."""
    spec = quantizer("int4-g32+gptq")
    whole = spec.quantize(layer[0], layer[2]).dequantize()
    monkeypatch.setattr("epic_quant.quant.base._COMPENSATED_CHUNK", 10 * COLS)
    parts = spec.quantize(layer[0], layer[2]).dequantize()
    assert (parts == whole).float().mean() > 0.99
    assert output_error("int4-g32+gptq", layer, layer[2]) < 0.66 * output_error("int4-g32", layer, None)
