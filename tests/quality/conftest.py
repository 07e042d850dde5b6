"""What the tests of quality use."""

import pytest
import torch

from epic_quant.gemma4.config import TextConfig
from epic_quant.quality import noise_floor
from epic_quant.quality.passes import Memory
from epic_quant.quality.variants import with_reference
from epic_quant.spec import NOISE_FLOOR, REFERENCE

BOS = 2


@pytest.fixture(scope="session")
def windows():
    """Three windows of 17 tokens, each nearly three of the toys' sliding windows; [3, 17]."""
    ids = torch.randint(3, 120, (3, 17), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = BOS
    return ids


@pytest.fixture
def small_slices(monkeypatch):
    """Slices that divide neither the toys' 120 ids nor a window's 16 predictions, and windows one by one or in twos."""
    monkeypatch.setattr("epic_quant.quality.stream.HEAD_ROWS", 50)
    monkeypatch.setattr("epic_quant.quality.stream.HEAD_TOKENS", 7)
    monkeypatch.setattr("epic_quant.quality.stream.BATCH_TOKENS", 40)


@pytest.fixture
def tight_memory(toy_checkpoint, windows):
    """Memory in which every policy, and the noise floor, fits beside the reference, but not all of them together."""

    def nbytes(policies):
        config = TextConfig.read(toy_checkpoint)
        memory = Memory(config, *windows.shape)
        needs = memory.needs(with_reference({**policies, NOISE_FLOOR: noise_floor()}, config))
        least = max(memory.nbytes([needs[REFERENCE], need]) for need in needs.values())
        assert least < memory.nbytes(needs.values())
        return least

    return nbytes
