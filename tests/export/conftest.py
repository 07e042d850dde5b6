"""The small model, whose tokenizer is like Gemma's, exported."""

from pathlib import Path

import pytest

from epic_quant.checkpoint import Checkpoint
from epic_quant.export.__main__ import main

MINI = Path(__file__).resolve().parents[2] / "benchmarks" / "mini_gemma4"


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    """`export(format, policy, *options)`: what the command line makes of the small model."""

    def made(file_format, policy, *options):
        out = tmp_path_factory.mktemp("export") / "out"
        assert main([str(MINI), "--policy", policy, "--format", file_format, str(out), *options]) == 0
        return out

    return made


@pytest.fixture(scope="session")
def mini():
    with Checkpoint.open(MINI) as checkpoint:
        yield checkpoint
