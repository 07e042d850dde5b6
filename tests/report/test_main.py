import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from epic_quant import __version__
from epic_quant.records import Record
from epic_quant.report.__main__ import main
from epic_quant.report.writing import FILE_NAMES
from epic_quant.results.partial import PartialWriter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "made" / "reports"


@pytest.fixture(scope="module")
def written(run_json, tmp_path_factory):
    """The folder of a report of everything, written by a process of its own, and which large libraries it imported."""
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "out.json"
    path.write_text(json.dumps(run_json()), encoding="utf-8")
    program = (
        "import sys; from epic_quant.report.__main__ import main; status = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'matplotlib.pyplot', 'safetensors') if name in sys.modules], status)"
    )
    command = [sys.executable, "-c", program, str(path), "--out", str(folder / "reports")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return folder / "reports", done.stdout.splitlines()[-1]


def test_the_report_and_its_plots_are_written_and_named(written):
    out = written[0]
    text = (out / "COMPARISON.md").read_text(encoding="utf-8")
    plots = sorted(path.name for path in out.glob("*.svg"))
    assert len(plots) == 10
    assert sorted(path.name for path in out.iterdir()) == sorted(["COMPARISON.md", "index.html", *plots])
    for name in plots:
        ElementTree.parse(out / name)
        assert f"]({name})" in text


def test_two_runs_write_the_same_bytes_and_print_where(written, run_json, write_json, out, capsys):
    assert main([str(write_json(run_json())), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out / "COMPARISON.md"), str(out / "index.html")]
    here, there = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (out, written[0]))
    assert here == there


def test_a_report_imports_neither_torch_nor_pyplot(written):
    assert written[1] == "[] 0"


def test_the_default_folder_is_reports(run_json, write_json, tmp_path, monkeypatch):
    path = write_json(run_json("footprint"))
    monkeypatch.chdir(tmp_path)
    assert main([str(path)]) == 0
    assert (tmp_path / "reports" / "COMPARISON.md").exists()


def test_lines_end_alike_on_every_system(written):
    assert not any(b"\r" in path.read_bytes() for path in written[0].iterdir())


def test_bad_input_is_one_line_and_status_2_and_writes_nothing(write_json, out, capsys):
    assert main([str(write_json('{"benchmarks": [')), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not out.exists()


def test_a_folder_that_is_a_file_is_reported(run_json, write_json, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("mine", encoding="utf-8")
    for folder in (taken, taken / "below"):
        assert main([str(write_json(run_json("block"))), "--out", str(folder)]) == 2
        assert "cannot be written" in capsys.readouterr().err
    assert taken.read_text(encoding="utf-8") == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_folder_without_permission_is_reported(run_json, write_json, tmp_path, capsys):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    assert main([str(write_json(run_json("block"))), "--out", str(folder)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_full_disk_leaves_what_was_there(run_json, write_json, out, monkeypatch, capsys):
    out.mkdir(parents=True)
    (out / "COMPARISON.md").write_text("old", encoding="utf-8")
    write_text = Path.write_text

    def fail_late(self, *arguments, **named):
        if self.name == "COMPARISON.md":
            raise OSError(28, "No space left on device")
        return write_text(self, *arguments, **named)

    path = write_json(run_json("block"))
    monkeypatch.setattr(Path, "write_text", fail_late)
    assert main([str(path), "--out", str(out)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert [(file.name, file.read_text(encoding="utf-8")) for file in out.iterdir()] == [("COMPARISON.md", "old")]


def test_csv_is_written_beside_no_plots(run_json, write_json, out, capsys):
    assert main([str(write_json(run_json("block"))), "--out", str(out), "--format", "csv"]) == 0
    assert [path.name for path in out.iterdir()] == ["records.csv"]
    assert capsys.readouterr().out == f"{out / 'records.csv'}\n"


@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_dash_prints_what_would_be_written(name, run_json, write_json, out, tmp_path, capsys):
    path = write_json(run_json("block"))
    assert main([str(path), "--out", str(out), "--format", name]) == 0
    capsys.readouterr()
    assert main([str(path), "--out", "-", "--format", name]) == 0
    printed, written = capsys.readouterr().out, (out / FILE_NAMES[name]).read_text(encoding="utf-8")
    if name == "md":
        # Plots are files.
        written = re.sub(r"!\[.*?\]\(.*?\)\n\n", "", written)
    assert printed == written
    assert not (tmp_path / "-").exists()


def test_a_dash_takes_one_format(run_json, write_json, capsys):
    assert main([str(write_json(run_json("block"))), "--out", "-", "--format", "md,csv"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: --out - prints one format: name it with --format\n"


def test_an_unknown_format_is_status_2_and_names_the_known(run_json, write_json, capsys):
    with pytest.raises(SystemExit) as left:
        main([str(write_json(run_json("block"))), "--format", "md,pdf"])
    assert left.value.code == 2
    assert "'pdf' is not a format; known: md, " in capsys.readouterr().err


def module(*arguments):
    command = [sys.executable, "-m", "epic_quant.report", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)


def test_help_has_an_example():
    done = module("--help")
    assert done.returncode == 0
    assert "python -m epic_quant.report out.json --out reports\n" in done.stdout


def test_version():
    assert module("--version").stdout == f"epic_quant {__version__}\n"


def test_a_missing_argument_is_status_2():
    assert module().returncode == 2


def test_a_missing_file_is_status_2_without_a_traceback(tmp_path):
    done = module(str(tmp_path / "none.json"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_help_does_not_wait_for_matplotlib():
    program = "import sys, epic_quant.report.__main__; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def gated(run_json, write_json, out, *options):
    return main([str(write_json(run_json("quality"))), "--out", str(out), *map(str, options)])


def test_limits_that_are_kept_are_reported_and_status_0(run_json, write_json, out, capsys):
    assert gated(run_json, write_json, out, "--fail-if", "kl_divergence[subject=quality]:0.5") == 0
    assert capsys.readouterr().err == "5 of 5 values within their limit\n"
    text = (out / "COMPARISON.md").read_text(encoding="utf-8")
    assert "Limits: `kl_divergence[subject=quality]:0.5`. 5 of 5 values within their limit." in text


def test_a_limit_that_is_not_kept_is_status_1_a_table_and_a_report(run_json, write_json, out, capsys):
    options = ["--fail-if", "kl_divergence[subject=quality]:0.025", "--fail-if", "top1_agreement:0.5"]
    assert gated(run_json, write_json, out, *options) == 1
    printed = capsys.readouterr().err
    assert "kl_divergence  quality  policy=original-1.58" in printed
    assert "2 of 10 values past their limit" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert "2 of 10 values past their limit" in (out / "COMPARISON.md").read_text(encoding="utf-8")


def test_a_baseline_stands_beside_the_run(run_json, write_json, out, tmp_path, capsys):
    old = run_json("quality")
    for entry in old["benchmarks"][1:]:
        entry["extra_info"]["epic_quant"]["metrics"]["kl_divergence"] *= 0.9
    baseline = tmp_path / "old.json"
    baseline.write_text(json.dumps(old), encoding="utf-8")
    named = ["--baseline", baseline, "--fail-if"]
    assert gated(run_json, write_json, out, *named, "kl_divergence:+12%") == 0
    assert "### kl_divergence\n" in (out / "COMPARISON.md").read_text(encoding="utf-8")
    assert gated(run_json, write_json, out, *named, "kl_divergence:+10%") == 1
    assert "+11%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fail-if", "kl_divergance:1"], "unknown metric 'kl_divergance'; did you mean kl_divergence"),
        (["--fail-if", "kl_divergence[policy=int4-g12]:1"], "unknown policy of kl_divergence 'int4-g12'; did you mean"),
        (["--fail-if", "kl_divergence:+5%"], "Name an older run with --baseline"),
        (["--fail-if", "kl_divergence"], "is not a condition"),
        (["--baseline", "none.json"], "none.json: no such file"),
    ],
)
def test_an_invalid_limit_is_status_2_and_writes_nothing(options, message, run_json, write_json, out, capsys):
    assert gated(run_json, write_json, out, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def partial(tmp_path, facts, record):
    writer = PartialWriter(
        tmp_path / "out.partial.jsonl", facts, ["benchmarks/test_x.py::one", "benchmarks/test_x.py::two"]
    )
    writer.record("benchmarks/test_x.py::one", record)
    writer.finished("benchmarks/test_x.py::one", "passed", 1.0)
    writer.close()


@pytest.mark.parametrize("name", ["out.json", "out.partial.jsonl"])
def test_a_run_that_stopped_is_reported_with_what_is_missing(name, run_json, out, tmp_path, capsys):
    record = Record("kv_bytes", {"kv_policy": "int4", "model": "E4B", "tokens": "1024"}, {"nbytes": 5})
    partial(tmp_path, run_json("kv_bytes")["epic_quant"], record)
    assert main([str(tmp_path / name), "--out", str(out)]) == 0
    text = (out / "COMPARISON.md").read_text(encoding="utf-8")
    assert "1 of its tests have no result" in text
    assert "| `benchmarks/test_x.py::two`" in text
    assert ("out.json was not written to its end; the report is made of" in capsys.readouterr().err) == (
        name == "out.json"
    )


def test_a_later_run_that_stopped_is_pointed_to(run_json, write_json, out, tmp_path, capsys):
    partial(tmp_path, run_json()["epic_quant"], Record("quality", {"policy": "int4"}, {}))
    assert main([str(write_json(run_json("block"))), "--out", str(out)]) == 0
    assert "out.partial.jsonl is of a run that did not end" in capsys.readouterr().err
