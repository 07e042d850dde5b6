"""What a run leaves where it does not end, and what ends it before it begins."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from epic_quant.errors import EpicQuantError
from epic_quant.plugin.run import Run
from epic_quant.results.partial import partial_path
from epic_quant.results.reading import read_run

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def stopped(command, out, records, how):
    """Run pytest until so many records are on the disk, stop it, and give its exit status."""
    partial = partial_path(out)
    # A shell starts what runs in its background deaf to SIGINT, and so would be what that starts.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(**command, **heard, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(6000):
                if partial.exists() and partial.read_text(encoding="utf-8").count('"record"') >= records:
                    break
                assert process.poll() is None, "ended before it could be stopped"
                time.sleep(0.02)
            process.send_signal(how)
            return process.wait(timeout=120)
        finally:
            process.kill()


@pytest.fixture
def blocks(model, process_of, tmp_path):
    """The command of a run of many short measurements, and its JSON's path."""
    out = tmp_path / "out.json"
    options = ["--checkpoint", model, "--text", model / "text.txt", "--benchmark-json", out]
    return process_of("benchmarks/test_block.py", *options), out


@POSIX
def test_a_run_that_is_killed_is_reported_with_what_is_missing(blocks, run_report, tmp_path):
    command, out = blocks
    assert stopped(command, out, 5, signal.SIGKILL) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial.jsonl"]
    run = read_run(out)
    planned = json.loads(partial_path(out).read_text(encoding="utf-8").splitlines()[0])["planned"]
    assert len(run.records) >= 5
    assert len(planned) - len(run.records) <= len(run.facts["missing"]) < len(planned)
    printed = run_report(out, "--out", tmp_path / "report")
    assert "out.json was not written to its end" in printed
    report = (tmp_path / "report" / "COMPARISON.md").read_text(encoding="utf-8")
    assert f"{len(run.facts['missing'])} of its tests have no result" in report
    assert "benchmarks/test_block.py::test_block" in report


@POSIX
def test_a_run_that_is_interrupted_writes_its_json_and_says_what_is_missing(blocks, tmp_path):
    command, out = blocks
    assert stopped(command, out, 3, signal.SIGINT) == 2  # also where a measurement had no round yet
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert len(read_run(out).facts["missing"]) > 0


@pytest.fixture
def without_tokenizer(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    return folder


def refused(run_pytest, tmp_path, *arguments):
    """What was printed of a run that must end with status 2 before it measures, and leave nothing."""
    folder = tmp_path / "made"
    folder.mkdir()
    status, printed = run_pytest(*arguments, "--benchmark-json", folder / "out.json")
    assert status == 2, printed
    assert "Traceback" not in printed
    assert "epic_quant =" not in printed
    assert list(folder.iterdir()) == []
    return printed


@pytest.mark.parametrize("subject", ["block", "kv", "ple", "quality", "weights"])
def test_a_missing_tokenizer_is_reported_before_anything_that_needs_one(
    subject, without_tokenizer, run_pytest, tmp_path
):
    printed = refused(run_pytest, tmp_path, f"benchmarks/test_{subject}.py", "--checkpoint", without_tokenizer)
    assert "no tokenizer.json beside it" in printed


def test_what_needs_no_text_needs_no_tokenizer(without_tokenizer, run_pytest):
    status, printed = run_pytest("benchmarks/test_footprint.py", "--checkpoint", without_tokenizer, "--policy", "int8")
    assert status == 0, printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ple_trace": "none.npy"}, "none.npy: cannot be read as a .npy array"),
        ({"ple_trace": "none.txt"}, "none.txt: cannot be read as UTF-8 text"),
        ({"ple_trace": "long.npy"}, "long.npy: token id 999 is out of range"),
        ({"text": "none.txt"}, "none.txt: cannot be read as UTF-8 text"),
        ({"text": "same.txt", "calibration_text": "copy.txt"}, "calibrated on the evaluation text"),
        ({"calibration_text": "none.txt"}, "none.txt: cannot be read as UTF-8 text"),
        ({"hessians": "none.safetensors"}, "none.safetensors"),
        ({"resume": "same.txt"}, "cannot be made a folder to resume from"),
    ],
)
def test_an_unreadable_file_is_reported_before_anything_is_measured(options, message, model, tmp_path, pytestconfig):
    np.save(tmp_path / "long.npy", np.array([1, 999]))
    for name in ("same.txt", "copy.txt"):
        (tmp_path / name).write_text("5 6 7 8 9", encoding="utf-8")
    paths = {name: tmp_path / file for name, file in options.items()}
    run = Run(
        argparse.Namespace(**vars(pytestconfig.option) | {"checkpoint": str(model)} | paths), pytestconfig.rootpath
    )
    with run.checkpoint, pytest.raises(EpicQuantError) as caught:
        run.check_inputs(())
    assert message in str(caught.value)


def test_a_text_too_short_for_the_plan_is_reported(model, tmp_path, run_pytest):
    text = tmp_path / "short.txt"
    text.write_text("5 6 7 8 9", encoding="utf-8")
    printed = refused(run_pytest, tmp_path, "benchmarks/test_kv.py", "--checkpoint", model, "--text", text)
    assert "short.txt: 5 tokens, but 1 windows of" in printed


def test_a_json_that_cannot_be_written_is_reported_before_anything_is_measured(model, tmp_path, run_pytest):
    out = tmp_path / "none" / "out.json"
    status, printed = run_pytest("benchmarks/test_footprint.py", "--checkpoint", model, "--benchmark-json", out)
    assert status == 2
    assert "out.partial.jsonl: cannot be written: No such file or directory" in printed
