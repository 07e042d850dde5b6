"""Trellises, against streams of bits that are read and tried one by one."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_quant import kernels
from epic_quant.errors import SpecError
from epic_quant.metrics import relative_l2
from epic_quant.quant import format_named, quantize
from epic_quant.quant.trellis import find_compensated_paths, find_paths
from epic_quant.spec import KVStorageSpec, WeightSpec

from .conftest import same_tensors, stored

parse = WeightSpec.parse
NAMES = [f"trellis{bits}{state}" for bits in range(1, 5) for state in ("", "-l16")]


def gaussian(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def options(spec):
    """Bits, state bits and the table of a spec."""
    chosen = format_named(spec.format).with_options(spec)
    return chosen.num_bits, chosen.state_bits, chosen.table


def values_of(stream, cols, spec):
    """The values of a row, in units of the scale, of its stream of bits."""
    bits, state_bits, table = options(spec)
    stream = [*stream, *[0] * state_bits]
    values = []
    for start in range(0, cols * bits, bits):
        state = sum(bit << place for place, bit in enumerate(stream[start : start + state_bits]))
        byte = state * table.multiplier % 65536 // 256
        values.append(table.upper[byte // 16] + table.lower[byte % 16])
    return values


def stream_of(row, cols, bits):
    """The bits of a packed row: of words in order, or of eight streams of 16 weights side by side."""
    words, in_order = [int(word) for word in np.frombuffer(row.numpy().tobytes(), "<u2")], []
    for piece in range(cols // 128):
        own = words[piece * 8 * bits : (piece + 1) * 8 * bits]
        in_order += [own[8 * word + stream] for stream in range(8) for word in range(bits)]
    in_order += words[len(in_order) :]
    return [word >> bit & 1 for word in in_order for bit in range(16)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cols", [1, 7, 16, 100, 128, 300, 640])
def test_a_weight_is_the_value_of_the_bits_from_its_own_on(name, cols):
    quantized = stored(gaussian(3, cols), name)
    bits, _, _ = options(quantized.spec)
    assert quantized.packed.shape[1] == -(-cols * bits // 16) * 2
    for row, scale, decoded in zip(quantized.packed, quantized.scale, quantized.dequantize(), strict=True):
        stream = stream_of(row, cols, bits)
        assert not any(stream[cols * bits :])
        expected = torch.tensor(values_of(stream, cols, quantized.spec)) * scale.float()
        assert torch.equal(decoded, expected)


@pytest.mark.parametrize(("bits", "cols"), [(1, 10), (2, 5), (3, 3), (4, 2), (4, 1)])
@pytest.mark.parametrize("state_bits", [12, 16])
def test_no_other_path_of_a_short_row_is_nearer(bits, cols, state_bits):
    """All streams of so few bits are tried; a path's cost is exact to what words of 16 bits round."""
    spec = parse(f"trellis{bits}-l{state_bits}")
    every = [values_of(stream, cols, spec) for stream in itertools.product((0, 1), repeat=bits * cols)]
    every = torch.tensor(every, dtype=torch.float64)
    values = format_named(spec.format).with_options(spec).values
    x = (gaussian(20, cols) * 40).clamp(-100, 100)
    words = (x * 256).round().short()
    before = torch.full((20,), -1)
    states = find_paths(words, (values * 256).short(), bits, before, cols, ends=True, backend="reference")
    cost = (values[states].double() - x).square().sum(1)
    least = (every - x.double().unsqueeze(1)).square().sum(2).amin(1)
    assert (cost - least).abs().max() < cols * 1.1


@pytest.mark.parametrize("isa", kernels.isas()[:-1])
@settings(max_examples=25, derandomize=True)
@given(
    bits=st.integers(1, 4),
    state_bits=st.sampled_from([12, 12, 13]),
    rows=st.sampled_from([1, 3, 9]),
    cols=st.integers(1, 40),
    kept=st.integers(1, 40),
    ends=st.booleans(),
    size=st.sampled_from([0.0, 1.0, 40.0, 300.0]),
    seed=st.integers(0, 999),
)
def test_every_kernel_finds_the_path_of_the_reference(isa, bits, state_bits, rows, cols, kept, ends, size, seed):
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.integers(-127, 128, 1 << state_bits) * 256).short()
    x = torch.from_numpy((rng.standard_normal((rows, cols)) * size * 256).clip(-32768, 32767)).short()
    before = torch.from_numpy(rng.integers(-1, 1 << state_bits, rows)) * torch.from_numpy(rng.integers(0, 2, rows))
    # A state that goes before must leave bits that can be zeros.
    ends = ends and cols * bits >= state_bits - bits
    arguments = (x, values, bits, before - (seed % 2), min(kept, cols))
    expected = find_paths(*arguments, ends=ends, backend="reference")
    assert torch.equal(find_paths(*arguments, ends=ends, backend=isa), expected)
    # Each state follows the one before it.
    shared = (1 << state_bits - bits) - 1
    both = torch.cat([(before - (seed % 2)).unsqueeze(1).int(), expected], dim=1)
    follows = (both[:, 1:] >> bits == both[:, :-1] & shared) | (both[:, :-1] < 0)
    assert follows.all()


def compensated(x, factor, name, most, backend, before=-1):
    """The states of a search in rows x with scales of 1, and the sum of squared errors that its path has."""
    chosen = format_named(name)
    first = torch.full((len(x),), before)
    found = find_compensated_paths(
        *(x, torch.ones_like(x), factor, chosen.values, chosen.num_bits, first, x.shape[1], most),
        ends=True,
        backend=backend,
    )
    errors = torch.linalg.solve_triangular(factor, x - chosen.values[found], upper=True, left=False)
    return found, errors.square().sum(1)


@pytest.mark.parametrize("isa", kernels.isas()[:-1])
@settings(max_examples=15, derandomize=True)
@given(
    bits=st.integers(1, 4),
    cols=st.sampled_from([1, 2, 7, 31, 32, 33, 75]),
    most=st.sampled_from([1, 3, 16, 100]),
    is_free=st.booleans(),
    size=st.sampled_from([0.0, 1.0, 40.0, 1e6]),
    seed=st.integers(0, 999),
)
def test_every_kernel_compensates_as_the_reference_does(isa, bits, cols, most, is_free, size, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, cols, generator=rng) * size
    factor = torch.eye(cols) + 0.2 * torch.randn(cols, cols, generator=rng).triu(1)
    arguments = (x, factor, f"trellis{bits}", most)
    before = -1 if is_free else 0
    found, _ = compensated(*arguments, isa, before)
    assert torch.equal(found, compensated(*arguments, kernels.REFERENCE, before)[0])


def test_a_short_row_is_compensated_as_well_as_by_any_path():
    """With as many survivors as there are paths, the errors that compensation leaves are the least of all."""
    spec, rng = parse("trellis2"), torch.Generator().manual_seed(3)
    factor = torch.eye(5) + 0.5 * torch.randn(5, 5, generator=rng).triu(1)
    x = torch.randn(4, 5, generator=rng) * 40
    _, least = compensated(x, factor, "trellis2", 4096, kernels.REFERENCE)
    every = torch.tensor([values_of(stream, 5, spec) for stream in itertools.product((0, 1), repeat=10)]).float()
    errors = torch.linalg.solve_triangular(factor, x.unsqueeze(1) - every, upper=True, left=False)
    torch.testing.assert_close(least, errors.square().sum(2).amin(1))


@pytest.mark.parametrize("spec", ["trellis2+gptq", "trellis3+had64+gptq"])
def test_weights_too_large_for_any_scale_saturate(spec):
    weight = gaussian(2, 192)
    weight[1] *= 1e37
    hessian, given = torch.eye(192) + 0.5, weight.clone()
    found, expected = (quantize(weight, parse(spec), hessian, backend=one) for one in (None, kernels.REFERENCE))
    assert same_tensors(found, expected)
    assert torch.equal(weight, given)
    assert found.dequantize().isfinite().all()
    assert relative_l2(found.dequantize()[0], weight[0]) < 0.6


def test_more_survivors_leave_smaller_errors():
    rng = torch.Generator().manual_seed(0)
    factor = torch.eye(128) + 0.1 * torch.randn(128, 128, generator=rng).triu(1)
    x = torch.randn(16, 128, generator=rng) * 40
    few, some, many = (compensated(x, factor, "trellis2", most, None)[1].mean() for most in (4, 32, 256))
    assert many < 0.9 * some < 0.8 * few


@pytest.mark.parametrize("isa", kernels.isas()[:-1])
@pytest.mark.parametrize("spec", ["trellis1", "trellis2-g16", "trellis3+had64", "trellis4-l16", "trellis2+had64+gptq"])
def test_every_kernel_stores_what_the_reference_stores(isa, spec):
    weight = gaussian(3, 320 if "l16" not in spec else 48)
    hessian = torch.eye(320) + 0.5 if "gptq" in spec else None
    found, expected = (quantize(weight, parse(spec), hessian, backend=one) for one in (isa, kernels.REFERENCE))
    assert same_tensors(found, expected)
    assert torch.equal(found.dequantize(), expected.dequantize())


@pytest.mark.parametrize(
    ("spec", "bits", "rel_l2"),
    [
        ("trellis2", 2.02, 0.270),
        ("trellis3", 3.02, 0.137),
        ("trellis4", 4.02, 0.073),
        ("trellis2-l16", 2.02, 0.265),
        ("trellis3-l16", 3.02, 0.134),
    ],
)
@pytest.mark.parametrize("draw", ["standard_normal", "laplace", "student"])
def test_the_error_is_within_a_decibel_of_the_least_possible(spec, bits, rel_l2, draw):
    rng, size = np.random.default_rng(7), (16 if "l16" in spec else 64, 2560)
    drawn = rng.standard_t(5, size) if draw == "student" else getattr(rng, draw)(size=size)
    weight = torch.from_numpy(drawn).float()
    quantized = stored(weight, f"{spec}+had256")
    assert quantized.bits_per_weight <= bits
    error = relative_l2(quantized.dequantize(), weight)
    shannon = 2.0**-quantized.bits_per_weight
    assert shannon < error <= rel_l2


@pytest.mark.parametrize("name", NAMES[:6:2])
def test_rows_of_one_weight_of_one_value_and_of_zeros(name):
    single = torch.tensor([[3.5], [-0.25], [0.0]])
    torch.testing.assert_close(stored(single, name).dequantize(), single, rtol=1e-3, atol=0)
    constant = torch.full((2, 300), 0.75)
    assert relative_l2(stored(constant, name).dequantize(), constant) < 0.6
    zeros = torch.zeros(2, 300)
    assert torch.equal(stored(zeros, name).dequantize(), zeros)


@pytest.mark.parametrize("at", [0, 150, 319])
def test_an_outlier_costs_its_row_and_no_other(at):
    weight = gaussian(3, 320)
    weight[1, at] = 1e6
    decoded = stored(weight, "trellis3").dequantize()
    assert relative_l2(decoded[[0, 2]], weight[[0, 2]]) < 0.2
    scalar = stored(weight, "codebook3").dequantize()
    assert relative_l2(decoded[1], weight[1]) < 0.75 * relative_l2(scalar[1], weight[1])
    # The last weights of a row have fewer choices, so that outliers are best spread over more than four.
    rotated = stored(weight, "trellis3+had4" if at < 319 else "trellis3+had64").dequantize()
    assert relative_l2(rotated, weight) < 0.5


def test_specs():
    assert str(parse("trellis3-l16-g128+had256+gptq")) == "trellis3-l16-g128+had256+gptq"
    assert parse("trellis3-l12") == parse("trellis3")
    assert parse("trellis3").state_bits is None
    for wrong, named in {
        "trellis3-l13": "13 state bits; expected 12 or 16",
        "int3-l12": "12 state bits; expected none",
        "trellis3-g8-l16": "option",
        "trellis5": "trellis4",
    }.items():
        with pytest.raises(SpecError, match=named):
            parse(wrong)
    with pytest.raises(SpecError, match="a trellis, whose codes overlap, is not for K and V"):
        KVStorageSpec.parse("trellis3")
