"""Errors of the formats against published values, exact solutions, and what each must reach."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from epic_quant.metrics import relative_l2
from epic_quant.quant import format_named, lloyd_max_rel_l2
from epic_quant.quant.codebook import lloyd_max_levels

from .conftest import stored

ROWS, COLS = 512, 2560


@pytest.fixture(scope="module", params=["gaussian", "laplace", "student5"])
def weight(request):
    rng = np.random.default_rng(7)
    draw = {
        "gaussian": lambda: rng.standard_normal((ROWS, COLS)),
        "laplace": lambda: rng.laplace(size=(ROWS, COLS)),
        "student5": lambda: rng.standard_t(5, (ROWS, COLS)),
    }[request.param]
    return torch.from_numpy(draw()).float()


@pytest.mark.parametrize(
    ("spec", "bits", "rel_l2"),
    [
        ("ternary+had256", 1.63, 0.440),
        ("codebook2+had256", 2.02, 0.345),
        ("codebook3+had256", 3.02, 0.187),
        ("codebook4+had256", 4.02, 0.0985),
        ("int4-g32+had256", 4.5, 0.083),
    ],
)
def test_rotated_formats_do_on_every_distribution_what_they_do_on_a_gaussian(weight, spec, bits, rel_l2):
    quantized = stored(weight, spec)
    assert quantized.bits_per_weight <= bits
    assert relative_l2(quantized.dequantize(), weight) <= rel_l2


def test_int4_in_groups_of_32_on_a_large_gaussian():
    weight = torch.randn(2048, COLS, generator=torch.Generator().manual_seed(0))
    quantized = stored(weight, "int4-g32")
    assert quantized.bits_per_weight == 4.5
    assert relative_l2(quantized.dequantize(), weight) <= 0.083


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_that_lie_on_the_grid_already_come_back_exactly(bits):
    half = 1 << (bits - 1)
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(-half, half, (500, 32), generator=rng)
    codes[:, 7] = -half
    weight = codes * (torch.rand(500, 1, generator=rng).half().float() - 0.5).half().float()
    assert torch.equal(stored(weight, f"int{bits}-g32").dequantize(), weight)


def exact_ternary_error(groups):
    """The least relative L2 that -s, 0, +s can reach: the k largest of a group are kept, for the best k."""
    sums = groups.abs().double().sort(dim=1, descending=True).values.cumsum(dim=1)
    gain = (sums.square() / torch.arange(1, groups.shape[1] + 1)).amax(dim=1)
    return math.sqrt(1 - gain.sum().item() / groups.double().square().sum().item())


@pytest.mark.parametrize("group", [16, 32, 128, 2560])
def test_ternary_is_within_a_thousandth_of_the_exact_least_squares(weight, group):
    few = weight[:64]
    error = relative_l2(stored(few, f"ternary-g{group}").dequantize(), few)
    assert error <= 1.001 * exact_ternary_error(few.view(-1, group))


@pytest.mark.parametrize(("bits", "excess"), [(2, 1.015), (3, 1.015), (4, 1.01), (6, 1.05), (8, 1.1)])
@pytest.mark.parametrize("group", [32, 2560])
def test_integer_scales_are_near_the_best_of_a_dense_search(weight, bits, excess, group):
    groups = weight[:16].reshape(-1, group)
    half = 1 << (bits - 1)
    least = torch.full((len(groups),), math.inf)
    for factor in torch.linspace(0.15, 1.2, 106).tolist():
        for sign in (1.0, -1.0):
            scale = sign * factor * groups.abs().amax(dim=1, keepdim=True) / half
            error = groups - (groups / scale).round().clamp(-half, half - 1) * scale
            least = torch.minimum(least, error.square().sum(dim=1))
    found = stored(groups, f"int{bits}").dequantize()
    assert relative_l2(found, groups) <= excess * math.sqrt(least.sum() / groups.square().sum())


@given(
    groups=arrays(
        np.float32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=st.floats(-1e3, 1e3, width=32)
    ),
    bits=st.integers(2, 8),
)
def test_affine_is_never_off_by_more_than_half_a_step(groups, bits):
    """Of a step over the range, exactly; and by what fp16 rounds the zero point and the step."""
    decoded = stored(torch.from_numpy(groups), f"affine{bits}").dequantize().double().numpy()
    least, largest = (end(groups.astype(np.float64), axis=1, keepdims=True) for end in (np.min, np.max))
    rounding = 2**-11 * (np.abs(least) + largest - least) + 2**-24 * 2**bits
    assert (np.abs(decoded - groups) <= (largest - least) / (2**bits - 1) / 2 + rounding).all()


def test_a_mean_far_from_zero_costs_affine_nothing():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    around_zero, far = (stored(weight + offset, "affine4") for offset in (0.0, 8.0))
    expected = relative_l2(around_zero.dequantize(), weight)
    assert relative_l2(far.dequantize() - 8, weight) == pytest.approx(expected, rel=0.02)
    assert relative_l2(stored(weight + 8, "int4").dequantize() - 8, weight) > 2 * expected


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_extra_level_falls_to_the_larger_side(bits):
    ramp = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).float().unsqueeze(0)
    below, above = (stored(weight, f"int{bits}") for weight in (ramp, -ramp))
    assert below.scale > 0
    assert torch.equal(above.scale, -below.scale)
    assert torch.equal(above.packed, below.packed)
    assert torch.equal(above.dequantize(), -ramp)


@pytest.mark.parametrize(
    ("num_levels", "positive", "error"),
    [
        (2, [0.7980], 0.3634),
        (4, [0.4528, 1.510], 0.1175),
        (8, [0.2451, 0.7560, 1.344, 2.152], 0.03454),
        (16, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
    ],
)
def test_levels_are_those_of_max_1960(num_levels, positive, error):
    levels = lloyd_max_levels(num_levels)
    assert levels[num_levels // 2 :] == pytest.approx(positive, rel=1e-3)
    assert levels == pytest.approx([-level for level in reversed(levels)])
    x = torch.linspace(-8, 8, 160001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    nearest = (x.unsqueeze(1) - torch.tensor(levels, dtype=torch.float64)).square().amin(dim=1)
    assert (nearest * density).sum().item() * 1e-4 == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebook_codes_are_the_nearest_entries(bits):
    codebook = format_named(f"codebook{bits}")
    assert codebook.table.dtype == torch.int8
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    scale = torch.full((64, 1), 0.02)
    decoded = codebook.decode(codebook.encode(weight, scale), scale)
    nearest = (weight.unsqueeze(2) - 0.02 * codebook.table.float()).abs().amin(dim=2)
    torch.testing.assert_close((weight - decoded).abs(), nearest)


@pytest.mark.parametrize(
    ("num_levels", "distortion"), [(2, 0.3634), (3, 0.1902), (4, 0.1175), (8, 0.03454), (16, 0.009497)]
)
def test_the_best_scalar_quantizers_error_is_the_published_one(num_levels, distortion):
    """Mean squared errors of Max (1960), table I."""
    assert lloyd_max_rel_l2(num_levels) ** 2 == pytest.approx(distortion, rel=5e-4)
