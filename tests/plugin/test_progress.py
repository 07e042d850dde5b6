"""What is printed while benchmarks run: as they are planned, on a terminal, in a log."""

import os
import re
import struct
import subprocess
import sys

import pytest

from epic_quant.plugin.progress import Remaining, clock

TESTS = ["f.py::one[a]", "f.py::one[b]", "f.py::one[c]", "f.py::two[a]", "f.py::two[b]"]


def test_before_any_test_has_ended_there_is_no_estimate():
    assert Remaining(TESTS, {}).seconds is None


def test_a_test_takes_as_long_as_those_of_its_function_without_what_the_first_set_up():
    remaining = Remaining(TESTS, {})
    remaining.ended(TESTS[0], 9.0, 1.0)
    assert remaining.seconds == 4 * 1.0
    remaining.ended(TESTS[1], 0.5, 1.5)
    # One more of the first function, and two of another, of which nothing else is known.
    assert remaining.seconds == 2.0 + 2 * 2.0
    remaining.ended(TESTS[2], 0.0, 4.0)
    remaining.ended(TESTS[3], 5.0, 1.0)
    assert remaining.seconds == 1.0
    remaining.ended(TESTS[4], 0.0, 1.0)
    assert remaining.seconds == 0
    assert remaining.times == {"f.py::one": (10.0, 3.0), "f.py::two": (6.0, 1.0)}


def test_an_earlier_run_is_believed_until_a_function_has_times_of_its_own():
    remaining = Remaining(TESTS, {"f.py::one": (20.0, 3.0), "f.py::two": (7.0, 5.0), "f.py::gone": (9.0, 9.0)})
    assert remaining.seconds == (20.0 + 2 * 3.0) + (7.0 + 5.0)
    remaining.ended(TESTS[0], 60.0, 8.0)
    assert remaining.seconds == 2 * 3.0 + (7.0 + 5.0)
    remaining.ended(TESTS[1], 0.0, 4.0)
    assert remaining.seconds == 4.0 + (7.0 + 5.0)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_times_are_written_as_a_clock_shows_them(seconds, text):
    assert clock(seconds) == text


def options(model):
    return ["benchmarks/test_footprint.py", "--checkpoint", model, "--policy", "original-4", "--benchmark-quiet"]


@pytest.mark.parametrize("verbosity", ["-q", "-v"])
def test_a_log_has_a_line_a_subject_and_no_colour(verbosity, model, run_pytest):
    status, printed = run_pytest(*options(model), verbosity)
    assert status == 0
    assert printed.count("footprint 0/8 on toy · 0% of the run") == 1
    assert "\x1b" not in printed
    assert "\r" not in printed


def on_a_terminal(command, **environment):
    """What pytest writes to a terminal of 100 columns."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command["env"] = command["env"] | {"TERM": "xterm"} | environment
    command["env"].pop("COLUMNS", None)
    written = b""
    with subprocess.Popen(**command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        try:
            while part := os.read(ours, 65536):
                written += part
        except OSError:  # Linux's way of saying that the other end is closed.
            pass
    os.close(ours)
    assert process.returncode == 0
    return written.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals of POSIX")
def test_a_terminal_has_one_line_a_subject_that_is_written_anew(model, process_of):
    written = on_a_terminal(process_of(*options(model)), NO_COLOR="1")
    lines = written.split("\r\n")
    (line,) = (line for line in lines if "footprint 0/8" in line)
    stages = line.split("\r")
    assert [text.partition(" ")[2][:3] for text in stages if text.startswith("footprint")] == [
        f"{ended}/8" for ended in range(9)
    ]
    assert re.search(r"footprint 5/8 on toy · 62% of the run, about 0:\d\d left · this checkpoint-original-4", line)
    assert re.fullmatch(r"footprint 8/8 on toy · took 0:\d\d *", stages[-1])
    assert max(map(len, stages)) < 100
    assert "test_footprint.py ." not in written
    assert "\x1b[" not in written, "NO_COLOR"


def test_other_tests_are_shown_as_by_pytest_and_fail_a_limit(run_pytest):
    status, printed = run_pytest("tests/test_units.py", "--fail-if", "nbytes:1GB")
    assert status == 2
    assert "error: no benchmark was run, so --fail-if" in printed
    status, printed = run_pytest("tests/test_units.py")
    assert status == 0
    assert "tests/test_units.py ....." in printed
    assert "epic_quant =" not in printed
    assert "of the run" not in printed
