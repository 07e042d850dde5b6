"""What is chosen to compute with, in a process of its own."""

import os
import subprocess
import sys

import pytest

from epic_quant import kernels

SCRIPT = "from epic_quant import kernels; print(kernels.isa())"


def run(isa, script=SCRIPT):
    environment = {**os.environ, "EPIC_QUANT_ISA": isa}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", kernels.isas())
def test_every_one_that_the_machine_has_can_be_forced(isa):
    assert run(isa).stdout.strip() == isa


def test_without_a_choice_it_is_the_fastest():
    assert run("").stdout.strip() == kernels.isas()[0]
    assert kernels.isas()[-1] == "reference"


def test_one_that_it_lacks_is_refused_with_those_it_has():
    done = run("avx1024")
    assert done.returncode
    assert done.stderr.strip().endswith(
        f"KernelError: EPIC_QUANT_ISA is 'avx1024', but this machine has: {', '.join(kernels.isas())}"
    )


def test_the_reference_takes_no_kernel():
    script = """
import torch
from epic_quant.quant import quantize
from epic_quant.spec import WeightSpec
quantized = quantize(torch.ones(2, 8), WeightSpec("int4"))
print(quantized.computed_by())
"""
    assert run("reference", script).stdout.strip() == "reference"
