"""A toy model with a tokenizer and a text, a run of it, and a watch over whatever reads a hostile input."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

# A reader that takes longer hangs.
_SECONDS = 20


@pytest.fixture(scope="session")
def model(toy, tmp_path_factory) -> Path:
    """A toy checkpoint that knows every token of its small vocabulary by its number."""
    folder = shutil.copytree(toy("e4b"), tmp_path_factory.mktemp("model") / "toy")
    tokens = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3} | {str(number): number for number in range(4, 120)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, step in (("text", 1), ("calibration", 7)):
        text = " ".join(str(4 + number * step % 100) for number in range(2_000))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def run_of_model(model, tmp_path_factory, run_pytest) -> Path:
    """The JSON of a run with footprints, prices and qualities; its prices lie beside it."""
    out = tmp_path_factory.mktemp("run") / "out.json"
    options = ["--checkpoint", model, "--policy", "mlp=int4", "--text", model / "text.txt"]
    options += ["--calibration-text", model / "calibration.txt"]
    options += ["--windows", "2", "--window-tokens", "32", "--price", "int4", "--price", "int8", "--price", "ternary"]
    options += ["-k", "footprint or prices or quality or memory", "--benchmark-json", out]
    files = [f"benchmarks/test_{subject}.py" for subject in ("footprint", "quality", "ple")]
    status, printed = run_pytest("-q", *files, *options)
    assert status == 0, printed
    return out


@pytest.fixture
def watched() -> Callable[..., object]:
    """A context in which whatever takes longer than some seconds raises TimeoutError, where the system has alarms."""

    @contextmanager
    def watch(what: str) -> Iterator[None]:
        def late(*_: object) -> None:
            raise TimeoutError(f"{what} took over {_SECONDS} s")

        if not hasattr(signal, "SIGALRM"):
            yield
            return
        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(_SECONDS)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    return watch


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What became of each odd input, in a verbose run."""
    reports = [report for found in ("passed", "failed") for report in terminalreporter.getreports(found)]
    verdicts = [value for report in reports for name, value in report.user_properties if name == "verdict"]
    if verdicts and terminalreporter.verbosity > 0:
        terminalreporter.section("odd inputs")
        terminalreporter.write("".join(f"{verdict}\n" for verdict in verdicts))
