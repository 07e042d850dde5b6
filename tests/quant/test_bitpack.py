"""Packing of codes into bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.quant.bitpack import BitPacking, TritPacking

WIDTHS = range(1, 9)


def random_codes(rows, num_codes, below, seed):
    return torch.randint(0, below, (rows, num_codes), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@given(num_bits=st.sampled_from(WIDTHS), rows=st.integers(1, 3), num_codes=st.integers(1, 40), seed=st.integers(0, 99))
def test_bits_come_back_from_bytes_that_numpy_lays_out_alike(num_bits, rows, num_codes, seed):
    codes = random_codes(rows, num_codes, 1 << num_bits, seed)
    packing = BitPacking(num_bits)
    packed = packing.pack(codes)
    bits = np.unpackbits(codes.numpy()[:, :, None], axis=2, count=num_bits, bitorder="little").reshape(rows, -1)
    assert np.array_equal(packed.numpy(), np.packbits(bits, axis=1, bitorder="little"))
    assert torch.equal(packing.unpack(packed, num_codes), codes)


@given(rows=st.integers(1, 3), num_codes=st.integers(1, 40), seed=st.integers(0, 99))
def test_trits_come_back(rows, num_codes, seed):
    codes = random_codes(rows, num_codes, 3, seed)
    packed = TritPacking().pack(codes)
    assert torch.equal(TritPacking().unpack(packed, num_codes), codes)
    first = sum(int(trit) * 3**place for place, trit in enumerate(codes[0, :5]))
    assert packed[0, 0] == first


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_eight_codes_take_num_bits_bytes(num_bits):
    assert BitPacking(num_bits).pack(torch.zeros(3, 8, dtype=torch.uint8)).shape == (3, num_bits)


@pytest.mark.parametrize("num_codes", [1, 4, 5, 6, 11, 2560])
@pytest.mark.parametrize("packing", [*map(BitPacking, WIDTHS), TritPacking()], ids=str)
def test_a_row_takes_the_bytes_that_row_nbytes_says(packing, num_codes):
    bits = 8 / 5 if isinstance(packing, TritPacking) else packing.num_bits
    packed = packing.pack(torch.ones(2, num_codes, dtype=torch.uint8))
    assert packed.shape[1] == packing.row_nbytes(num_codes) == int(np.ceil(np.round(num_codes * bits / 8, 6)))
    assert packed.is_contiguous()
