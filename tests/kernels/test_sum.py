"""The sum that measures how fast memory is read."""

import numpy as np
import pytest
import torch

from epic_quant.errors import KernelError
from epic_quant.kernels import sum_of


@pytest.mark.parametrize("count", [0, 1, 7, 8, 1000, 300_001])
def test_it_is_that_of_all_words(count):
    words = np.random.default_rng(0).integers(-(2**63), 2**63, count, dtype=np.int64)
    assert sum_of(torch.from_numpy(words)) == int(words.view(np.uint64).sum(dtype=np.uint64))


@pytest.mark.parametrize("words", [torch.zeros(4), torch.zeros(8, dtype=torch.int64)[::2]], ids=["floats", "strided"])
def test_other_buffers_are_refused(words):
    with pytest.raises(KernelError, match="expected contiguous"):
        sum_of(words)
