"""Error compensation."""

import math

import pytest
import torch

from epic_quant.errors import QuantizationError
from epic_quant.quant import Hessian, OutputHessian, quantize
from epic_quant.quant.gptq import inverse_cholesky_factor
from epic_quant.spec import WeightSpec

from .conftest import same_tensors, stored

ROWS, COLS = 96, 256


@pytest.fixture(scope="module")
def layer():
    """A weight, correlated inputs [n, cols], and their Hessian."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLS, generator=rng)
    mixing = torch.randn(COLS, COLS, generator=rng) * 0.9 ** torch.arange(COLS).unsqueeze(1).div(4)
    inputs = torch.randn(2048, COLS, generator=rng) @ mixing + 0.3 * torch.randn(2048, COLS, generator=rng)
    return weight, inputs, inputs.T @ inputs / len(inputs)


def output_error(spec, layer, hessian):
    weight, inputs, _ = layer
    error = stored(weight, spec, hessian).dequantize() - weight
    return math.sqrt((inputs @ error.T).square().sum() / (inputs @ weight.T).square().sum())


def test_compensation_takes_a_third_off_the_output_error(layer):
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
        "trellis2+had64",
    ],
)
def test_compensation_works_over_any_format(base, layer):
    assert output_error(f"{base}+gptq", layer, layer[2].double()) < 0.9 * output_error(base, layer, None)


@pytest.mark.parametrize("base", ["int4-g32", "ternary", "codebook3-g64"])
def test_compensation_for_uncorrelated_inputs_is_plain_rounding(base, layer):
    plain = stored(layer[0], base)
    compensated = stored(layer[0], f"{base}+gptq", torch.eye(COLS))
    assert same_tensors(plain, compensated)
    assert compensated.nbytes == plain.nbytes
    assert str(compensated.spec) == f"{base}+gptq"


def test_the_factor_is_the_root_of_the_damped_inverse(layer):
    hessian = layer[2].double()
    factor = inverse_cholesky_factor(hessian).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLS)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(COLS).double(), atol=1e-3, rtol=0)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("cols", [127, 129, 313])
def test_the_factor_in_slices_is_that_of_one_solution(cols, monkeypatch):
    monkeypatch.setattr("epic_quant.quant.gptq._FACTOR_COLUMNS", 128)
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(cols, cols, generator=rng, dtype=torch.float64)
    hessian = root @ root.T / cols
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(cols)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(inverse_cholesky_factor(hessian).double(), expected, rtol=1e-3, atol=1e-5)


def test_weights_and_specs_with_one_input_share_its_factors(layer):
    """One for each rotation, and bytes are those of a Hessian used once."""
    weight, _, hessian = layer
    asked = []

    def read():
        asked.append(1)
        return hessian

    shared = Hessian(read)
    for one in (weight, weight.flip(0)):
        for spec in ("int4-g32+gptq", "codebook3+had64+gptq", "codebook2+had64+gptq"):
            assert same_tensors(stored(one, spec, shared), stored(one, spec, hessian))
    assert len(asked) == 2


def test_unused_inputs_and_singular_hessians_are_fine(layer):
    weight, inputs, _ = layer
    few = inputs[:20].clone()
    few[:, 3] = 0.0
    hessian = few.T @ few / len(few)
    decoded = stored(weight, "int4-g32+gptq", hessian).dequantize()
    assert (decoded[:, 3] - weight[:, 3]).abs().max() < 0.5
    assert stored(weight, "int4+gptq", torch.zeros(COLS, COLS)).dequantize().isfinite().all()


def with_nan(hessian):
    hessian[0, 0] = math.nan
    return hessian


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (None, "needs the Hessian"),
        (torch.eye(8), r"shape \[8, 8\]; .*\[256, 256\]"),
        (with_nan(torch.eye(COLS)), "NaN"),
        (torch.ones(COLS, COLS).triu(), "not symmetric"),
        (-torch.eye(COLS), "not positive semidefinite"),
    ],
)
def test_a_hessian_that_does_not_fit_is_refused(layer, hessian, message):
    with pytest.raises(QuantizationError, match=message):
        stored(layer[0], "int4+gptq", hessian)


def test_rows_do_not_touch_each_other(layer):
    weight, _, hessian = layer
    spec = WeightSpec.parse("int4-g32+gptq")
    others = torch.arange(ROWS) % 7 != 3
    changed = torch.where(others.unsqueeze(1), weight.flip(0) * 3, weight)
    whole, again = (quantize(one, spec, hessian).dequantize() for one in (weight, changed))
    assert torch.equal(whole[~others], again[~others])
    assert not torch.equal(whole[others], again[others])


def test_many_chunks_are_as_one_but_for_the_rounding_of_sums(layer, monkeypatch):
    """Matrix products of other shapes may add up in another order, and a code on the edge may then fall elsewhere."""
    spec = WeightSpec.parse("int4-g32+gptq")
    whole = quantize(layer[0], spec, layer[2]).dequantize()
    monkeypatch.setattr("epic_quant.quant.grouped._COMPENSATED_ROWS", 10)
    parts = quantize(layer[0], spec, layer[2]).dequantize()
    assert (parts == whole).float().mean() > 0.99
    assert output_error("int4-g32+gptq", layer, layer[2]) < 0.66 * output_error("int4-g32", layer, None)


def brain_surgeon(weight, hessian, group_size, fitted_scale):
    """int4 by optimal brain surgeon (Hassibi and Stork, 1993), one column after another, in fp64, written out plainly.

    Rounding column q by e changes the others by -e H⁻¹[q] / H⁻¹[q, q], after which q is eliminated from H⁻¹.
    """
    rest, decoded = weight.double().clone(), torch.empty(weight.shape, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)).double())
    for q in range(weight.shape[1]):
        if q % group_size == 0:
            scale = fitted_scale(rest[:, q : q + group_size]).double()
        decoded[:, q] = (rest[:, q : q + 1] / scale).round().clamp(-8, 7)[:, 0] * scale[:, 0]
        rest -= (rest[:, q] - decoded[:, q]).outer(inverse[q] / inverse[q, q])
        inverse = inverse - inverse[:, q : q + 1] @ inverse[q : q + 1] / inverse[q, q]
    return decoded


@pytest.mark.parametrize("group_size", [8, 4])
def test_it_is_optimal_brain_surgeon_column_by_column(group_size):
    rng = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(64, 8, generator=rng), torch.randn(100, 8, generator=rng).double()
    inputs = inputs @ torch.randn(8, 8, generator=rng).double()
    hessian = inputs.T @ inputs / len(inputs)
    expected = brain_surgeon(weight, hessian, group_size, lambda group: stored(group.float(), "int4").scale)
    found = stored(weight, f"int4-g{group_size}+gptq", hessian).dequantize(torch.float64)
    assert torch.equal(found, expected)
    assert not torch.equal(found, stored(weight, f"int4-g{group_size}").dequantize(torch.float64))


def two_sided(hessian, outputs):
    """A weight's Hessian of inputs with that of outputs, [blocks, size, size] or one block."""
    return Hessian(lambda: hessian, OutputHessian(lambda: outputs if outputs.dim() == 3 else outputs.unsqueeze(0)))


@pytest.fixture(scope="module")
def outputs():
    """The Hessian of correlated gradients at the outputs."""
    rng = torch.Generator().manual_seed(1)
    mixing = torch.randn(ROWS, ROWS, generator=rng) * 0.9 ** torch.arange(ROWS).unsqueeze(1).div(4)
    gradients = torch.randn(2048, ROWS, generator=rng) @ mixing + 0.3 * torch.randn(2048, ROWS, generator=rng)
    return gradients.T @ gradients / len(gradients)


def two_sided_rounding(weight, hessian, outputs, fitted_scale):
    """int4 by YAQA's fixed point, one weight after another, in fp64, written out plainly.

    With H_I = M D Mᵀ and H_O = N D' Nᵀ, M and N unit upper triangular, each weight is rounded from itself less what the
    earlier ones make of NᵀEM there, E being their errors.
    """

    def unit_upper(matrix):
        damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(len(matrix)).double()
        lower = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
        return lower / lower.diagonal()

    m, n = unit_upper(hessian), unit_upper(outputs + 0.1 * outputs.diagonal().diag())
    errors, decoded = torch.zeros_like(weight), torch.zeros_like(weight)
    for row in range(len(weight)):
        scale = fitted_scale((weight[row] - n[:row, row] @ errors[:row]).unsqueeze(0)).double()[0, 0]
        for col in range(weight.shape[1]):
            value = weight[row, col] - n[:, row] @ errors @ m[:, col]
            decoded[row, col] = (value / scale).round().clamp(-8, 7) * scale
            errors[row, col] = decoded[row, col] - weight[row, col]
    return decoded


def test_row_by_row_it_is_the_two_sided_fixed_point(monkeypatch):
    monkeypatch.setattr("epic_quant.quant.gptq._TOGETHER", 1)
    monkeypatch.setattr("epic_quant.quant.gptq.SWEEPS", 0)
    rng = torch.Generator().manual_seed(5)
    weight = torch.randn(12, 8, generator=rng)
    hessian, outputs = (
        one.T @ one
        for one in (
            torch.randn(100, n, generator=rng).double() @ torch.randn(n, n, generator=rng).double() for n in (8, 12)
        )
    )
    order = outputs.diagonal().argsort(descending=True)
    expected = torch.empty(weight.shape, dtype=torch.float64)
    expected[order] = two_sided_rounding(
        weight[order].double(), hessian, outputs[order][:, order], lambda group: stored(group.float(), "int4").scale
    )
    found = stored(weight, "int4+yaqa", two_sided(hessian, outputs)).dequantize(torch.float64)
    assert torch.equal(found, expected)
    assert not torch.equal(found, stored(weight, "int4+gptq", hessian).dequantize(torch.float64))


@pytest.mark.parametrize("base", ["int3-g128", "codebook2+had64", "ternary-g32"])
def test_outputs_that_matter_alike_leave_the_compensation_of_columns(base, layer, monkeypatch):
    """Before weights are rounded once more."""
    monkeypatch.setattr("epic_quant.quant.gptq.SWEEPS", 0)
    one_sided = stored(layer[0], f"{base}+gptq", layer[2])
    assert same_tensors(one_sided, stored(layer[0], f"{base}+yaqa", two_sided(layer[2], torch.eye(ROWS))))


@pytest.mark.parametrize(
    "base", ["int3-g128", "int2-g32", "codebook3-g64", "codebook2+had64", "ternary", "affine3-g32", "trellis2+had64"]
)
def test_compensating_rows_too_lowers_the_two_sided_error(base, layer, outputs):
    """tr(Eᵀ H_O E H_I), for outputs that have much in common."""

    def loss(matrix):
        error = matrix.dequantize() - layer[0]
        return float(((outputs @ error @ layer[2]) * error).sum())

    one_sided = stored(layer[0], f"{base}+gptq", layer[2])
    found = stored(layer[0], f"{base}+yaqa", two_sided(layer[2], outputs))
    assert loss(found) < 0.8 * loss(one_sided)
    assert found.nbytes == one_sided.nbytes


@pytest.mark.parametrize("base", ["int3-g128", "codebook2+had64", "ternary-g32", "affine2-g32"])
def test_rounding_once_more_never_raises_the_two_sided_error(base, layer, outputs, monkeypatch):
    """tr(Eᵀ H_O E H_I), both damped as they are in rounding."""
    hessian = layer[2] + 0.01 * layer[2].diagonal().mean() * torch.eye(COLS)
    damped = outputs + 0.1 * outputs.diagonal().diag()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(ROWS)
    losses = []
    for sweeps in range(3):
        monkeypatch.setattr("epic_quant.quant.gptq.SWEEPS", sweeps)
        error = stored(layer[0], f"{base}+yaqa", two_sided(layer[2], outputs)).dequantize() - layer[0]
        losses.append(float(((damped @ error @ hessian) * error).sum()))
    assert losses[0] > 1.03 * losses[1]
    assert losses[1] >= losses[2]


def test_blocks_of_outputs_are_matrices_of_their_own(layer, outputs):
    half = ROWS // 2
    blocks = torch.stack([outputs[:half, :half], outputs[half:, half:]])
    whole = stored(layer[0], "int3-g128+yaqa", two_sided(layer[2], blocks))
    for ids, block in zip(torch.arange(ROWS).split(half), blocks, strict=True):
        part = stored(layer[0][ids], "int3-g128+yaqa", two_sided(layer[2], block))
        assert same_tensors(part, whole.rows(ids))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (None, "needs the Hessian of the gradients at the layer's outputs, and got none; make it with: "),
        (torch.eye(8), r"shape \[1, 8, 8\]; expected blocks of 96 rows in all"),
        (torch.ones(2, ROWS, ROWS // 2), "expected blocks of 96 rows in all"),
        (with_nan(torch.eye(ROWS)), "NaN"),
        (torch.ones(ROWS, ROWS).triu(), "not symmetric"),
        (-torch.eye(ROWS), "not positive semidefinite"),
    ],
)
def test_a_hessian_of_outputs_that_does_not_fit_is_refused(layer, outputs, message):
    hessian = Hessian(lambda: layer[2]) if outputs is None else two_sided(layer[2], outputs)
    with pytest.raises(QuantizationError, match=message):
        stored(layer[0], "int4+yaqa", hessian)


def test_a_row_that_is_no_number_is_named_in_any_order(layer):
    weight = layer[0].clone()
    weight[41, 3] = math.nan
    with pytest.raises(QuantizationError, match="NaN or infinity in row 41"):
        stored(weight, "int4+yaqa", two_sided(layer[2], torch.eye(ROWS)))
