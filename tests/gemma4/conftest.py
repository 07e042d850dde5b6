"""What the tests of the model's math use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FACTS = Path(__file__).parents[2] / "benchmarks" / "facts"


@pytest.fixture(scope="session")
def token_ids() -> Tensor:
    """Two sequences of 17 tokens, nearly three windows of the toys; [2, 17]."""
    return torch.randint(0, 120, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def long_token_ids() -> Tensor:
    """A sequence of 300 tokens: more than attend together, on sliding layers and on full ones; [1, 300]."""
    return torch.randint(0, 120, (1, 300), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def facts() -> Callable[[str], Any]:
    """A fresh copy of a published fact sheet by its file name."""
    return lambda name: json.loads((FACTS / name).read_text(encoding="utf-8"))
