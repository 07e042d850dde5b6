"""The kernels' own threads, which serve where there is no OpenMP, in a program that has nothing else."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "epic_quant" / "kernels" / "src"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(os.name != "posix" or not shutil.which(COMPILER[0]), reason="needs a compiler and fork")
def test_threads_share_work_and_survive_what_is_thrown_and_a_fork(tmp_path):
    program = tmp_path / "parallel"
    sources = [Path(__file__).with_name("parallel.cpp"), SOURCES / "parallel.cpp"]
    flags = ["-std=c++17", "-O1", "-pthread", f"-I{SOURCES}"]
    subprocess.run([*COMPILER, *flags, *map(str, sources), "-o", str(program), "-ldl"], check=True)
    ran = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "")
