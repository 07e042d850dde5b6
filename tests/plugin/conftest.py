"""pytest run as a user runs it, on a toy checkpoint with a tokenizer of its own."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def process_of():
    """The command and where and how to run it."""

    def of(*arguments, cwd=REPOSITORY):
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "NO_COLOR"))
        }
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]
        return {"args": command, "cwd": cwd, "env": environment}

    return of


@pytest.fixture(scope="session")
def run_pytest(process_of):
    """`run_pytest(*arguments)`: the exit status and what was printed, of `pytest` in the repository."""

    def run(*arguments, **options):
        process = process_of(*arguments, **options)
        done = subprocess.run(**process, capture_output=True, encoding="utf-8", check=False)
        return done.returncode, done.stdout + done.stderr

    return run


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
def model(toy, tmp_path_factory):
    """A toy checkpoint that knows every token of its small vocabulary by its number."""
    folder = shutil.copytree(toy("e4b"), tmp_path_factory.mktemp("model") / "toy")
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(120)}, unk_token="3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
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
    options = ["--text", model / "text.txt", "-k", "not ladder and not synthetic", "--benchmark-quiet"]
    limits = ["--benchmark-json", out, "--report", folder / "report", "--fail-if", "rel_l2[subject=weights]:1"]
    status, printed = run_pytest(*files, "--checkpoint", model, *policies, *options, *limits)
    assert status == 0, printed
    return Finished(printed, json.loads(out.read_text(encoding="utf-8")), out, folder / "report")
