"""pytest run as a user runs it, on a toy checkpoint with a tokenizer of its own."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def run_report():
    """`run_report(*arguments)`: what the report's command line printed; it must succeed."""

    def run(*arguments):
        command = [sys.executable, "-m", "epic_quant.report", *map(str, arguments)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def model(toy, numbers, tmp_path_factory):
    """A toy checkpoint that knows every token of its small vocabulary by its number."""
    folder = shutil.copytree(toy("e4b"), tmp_path_factory.mktemp("model") / "toy")
    numbers.save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text(" ".join(str(4 + number % 100) for number in range(10_000)), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Finished:
    """What a whole run printed, and what it left."""

    printed: str
    json: dict
    path: Path
    report: Path


@pytest.fixture(scope="session")
def finished(model, tmp_path_factory, run_pytest):
    """A whole run of three subjects under two policies, held to a limit that it keeps, with its report."""
    folder = tmp_path_factory.mktemp("run")
    out = folder / "out.json"
    files = [f"benchmarks/test_{subject}.py" for subject in ("footprint", "weights", "block")]
    policies = ["--policy", "original-4", "--policy", "mlp=ternary,kv=fp32,ple=lru:7"]
    few = "not ladder and not synthetic and not [16- and not [256-"
    options = ["--text", model / "text.txt", "-k", few, "--benchmark-quiet"]
    limits = ["--benchmark-json", out, "--report", folder / "report", "--fail-if", "rel_l2[subject=weights]:1"]
    status, printed = run_pytest(*files, "--checkpoint", model, *policies, *options, *limits)
    assert status == 0, printed
    return Finished(printed, json.loads(out.read_text(encoding="utf-8")), out, folder / "report")
