"""Runs Python programs in forks of one process that has imported torch, which takes longer than most of them do.

A line of stdin is the JSON of one run, and its exit status a line of stdout; no module of the package is imported here,
so that every run imports its own.
"""

import json
import os
import runpy
import sys

# What a run imports besides the package.
import numpy  # noqa: F401
import pytest  # noqa: F401
import safetensors.torch  # noqa: F401
import tabulate  # noqa: F401
import tokenizers  # noqa: F401
import torch  # noqa: F401
import tqdm  # noqa: F401

# What the first run compiles the others find, also where the environment forbids it beside the sources.
sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False

for line in sys.stdin:
    run = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        printed = os.open(run["printed"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.chdir(run["cwd"])
        os.environ.clear()
        os.environ.update(run["env"])
        # As `python -m` and `python -c` have it.
        sys.path[0:1] = [run["cwd"], *run["env"].get("PYTHONPATH", "").split(os.pathsep)]
        option, program, *arguments = run["args"]
        sys.argv = [option, *arguments]
        if option == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
