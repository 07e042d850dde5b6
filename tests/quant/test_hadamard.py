"""The rotation by signs and block Hadamard."""

import pytest
import torch

from epic_quant.quant import hadamard


@pytest.mark.parametrize(("cols", "block"), [(8, 8), (48, 16), (2560, 512), (7, 1)])
def test_rotating_keeps_inner_products_and_comes_back(cols, block):
    x = torch.randn(5, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated = hadamard.rotate(x, block)
    torch.testing.assert_close(rotated @ rotated.T, x @ x.T, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(hadamard.unrotate(rotated, block), x, atol=1e-5, rtol=1e-5)


def test_rotating_is_signs_times_sylvester_blocks():
    base = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    block = torch.kron(base, base) / 2
    signs = torch.tensor(SIGNS_OF_8)
    expected = torch.block_diag(block, block) * signs.unsqueeze(1)
    torch.testing.assert_close(hadamard.rotate(torch.eye(8), 4), expected)


# Stored weights depend on these: they must never change.
SIGNS_OF_8 = [-1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 1.0, -1.0]


@pytest.mark.parametrize(
    ("cols", "wanted", "used"), [(2560, 512, 512), (10240, 4096, 2048), (256, 512, 256), (768, 512, 256), (9, 64, 1)]
)
def test_the_block_is_the_largest_power_of_two_that_divides_the_row(cols, wanted, used):
    assert hadamard.block_for(cols, wanted) == used


def test_an_outlier_is_spread_over_its_block():
    x = torch.zeros(1, 512)
    x[0, 3] = 16.0
    rotated = hadamard.rotate(x, 256)
    assert torch.equal(rotated[0, :256].abs(), torch.ones(256))
    assert torch.equal(rotated[0, 256:], torch.zeros(256))
