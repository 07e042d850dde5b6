"""The rotation against NumPy's singular vectors, and that it is one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_quant.kv import directions as along


def tokens_of(count, heads, dims, seed=0, spread=1.0):
    """Normal [count, heads, dims] whose deviation along some direction of the head falls to `spread` along the last."""
    rng = np.random.default_rng(seed)
    mixed = [np.linalg.qr(rng.standard_normal((dims, dims)))[0] for _ in range(heads)]
    x = rng.standard_normal((heads, count, dims)) * np.geomspace(1, spread, dims)
    return torch.from_numpy(np.stack([one @ mix for one, mix in zip(x, mixed, strict=True)], axis=1)).float()


@pytest.mark.parametrize(("count", "dims", "directions"), [(100, 24, 1), (100, 24, 5), (30, 96, 12), (9, 8, 7)])
def test_the_first_coordinates_are_those_along_the_principal_directions(count, dims, directions):
    x = tokens_of(count, 3, dims, spread=0.01)
    rotated = along.rotate(x, along.reflectors(x, directions, torch.float32)).numpy()
    for head in range(3):
        tokens = x[:, head].double().numpy()
        expected = tokens @ np.linalg.svd(tokens)[2][:directions].T
        signs = np.sign((expected * rotated[:, head, :directions]).sum(axis=0))
        assert np.allclose(rotated[:, head, :directions] * signs, expected, atol=1e-5)


@settings(max_examples=60)
@given(st.data(), st.integers(1, 40), st.integers(1, 3), st.integers(2, 33))
def test_it_is_orthogonal_whatever_it_was_made_of(data, count, heads, dims):
    """Also of fewer tokens than directions, of none that vary, and with reflectors rounded to fp16."""
    directions = data.draw(st.integers(1, dims - 1))
    sample = tokens_of(count, heads, dims) * data.draw(st.sampled_from([0, 1e-30, 1, 1e30]))
    found = along.reflectors(sample, directions, torch.float16)
    assert found.shape == (heads, directions, dims)
    x = tokens_of(7, heads, dims, seed=1)
    rotated = along.rotate(x, found)
    assert torch.allclose(along.unrotate(rotated, found), x, atol=1e-5)
    # Inner products of every two tokens of a head stay.
    products = [torch.einsum("nhd,mhd->hnm", each.double(), each.double()) for each in (x, rotated)]
    assert torch.allclose(*products, atol=1e-4)
