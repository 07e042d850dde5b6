"""What every command line does alike."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from epic_quant import command_line
from epic_quant.errors import ReportError

CHECKPOINT = Path(__file__).parents[1] / "benchmarks" / "mini_gemma4"


def test_bad_input_is_one_line_whatever_a_name_holds(capsys):
    @command_line.reports_errors
    def main(arguments=None):
        raise ReportError("a\nb: cannot be read")

    assert main() == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: a b: cannot be read\n")


def test_the_status_of_main_is_that_of_the_program():
    for status in (0, 1, 2):
        with pytest.raises(SystemExit) as left:
            command_line.leave(lambda status=status: status)
        assert left.value.code == status


def test_an_interrupt_is_no_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        command_line.leave(main)
    assert left.value.code == command_line.INTERRUPTED
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no process alone a Ctrl-C")
@pytest.mark.parametrize("module", ["calibration", "export", "inspection"])
def test_an_interrupt_while_torch_is_imported_is_none_either(module, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n", encoding="utf-8")
    command = f"'{sys.executable}' -m epic_quant.{module} '{CHECKPOINT}'; exit $?"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, env=environment, cwd=CHECKPOINT.parents[1], check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (command_line.INTERRUPTED, b"", b"")


@pytest.mark.parametrize("lines", [1, 100_000], ids=["in the buffer", "past it"])
def test_a_reader_that_stops_early_gets_no_traceback(lines):
    program = (
        "from epic_quant import command_line\n"
        f"command_line.leave(lambda: [print('a line') for _ in range({lines})] and 0)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), error) == (command_line.BROKEN_PIPE, b"")


def test_inspecting_is_not_disturbed_by_it_either():
    command = [sys.executable, "-m", "epic_quant.inspection", str(CHECKPOINT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), error) == (command_line.BROKEN_PIPE, b"")


def test_text_is_utf8_with_its_own_line_breaks_on_every_system():
    program = "from epic_quant import command_line; command_line.print_text('a—b\\n')"
    command = [sys.executable, "-X", "utf8=0", "-c", program]
    done = subprocess.run(command, capture_output=True, env={"PYTHONIOENCODING": "ascii"}, check=True)
    assert done.stdout == "a—b\n".encode()


def test_help_has_no_colours_off_a_terminal():
    done = subprocess.run([sys.executable, "-m", "epic_quant.report", "--help"], capture_output=True, check=True)
    assert b"\x1b" not in done.stdout


@pytest.mark.parametrize("arguments", [["", "--out", "x"], ["out.json", "--out", ""], ["out.json", "--out="]])
def test_what_is_empty_is_refused_by_its_name(arguments, capsys):
    parser = command_line.parser("report", "", [], "")
    parser.add_argument("json")
    parser.add_argument("--out")
    assert parser.parse_args(["out.json", "--out", "x"]).out == "x"
    with pytest.raises(SystemExit) as left:
        parser.parse_args(arguments)
    assert left.value.code == 2
    assert "is empty; is a variable of the shell not set?" in capsys.readouterr().err
