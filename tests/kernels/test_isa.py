"""What is chosen to compute with, in a process of its own."""

import pytest

from epic_quant import kernels

SCRIPT = "from epic_quant import kernels; print(kernels.isa())"


@pytest.fixture
def run(run_python, monkeypatch):
    """`run(isa)`: the exit status and what was printed, of a script where this instruction set is chosen."""

    def of(isa, script=SCRIPT):
        monkeypatch.setenv("EPIC_QUANT_ISA", isa)
        return run_python("-c", script)

    return of


@pytest.mark.parametrize("isa", kernels.isas())
def test_every_one_that_the_machine_has_can_be_forced(isa, run):
    assert run(isa) == (0, f"{isa}\n")


def test_without_a_choice_it_is_the_fastest(run):
    assert run("") == (0, f"{kernels.isas()[0]}\n")
    assert kernels.isas()[-1] == "reference"


def test_one_that_it_lacks_is_refused_with_those_it_has(run):
    status, printed = run("avx1024")
    assert status
    assert printed.strip().endswith(
        f"KernelError: EPIC_QUANT_ISA is 'avx1024', but this machine has: {', '.join(kernels.isas())}"
    )


def test_the_reference_takes_no_kernel(run):
    script = """
import torch
from epic_quant.quant import quantize
from epic_quant.spec import WeightSpec
quantized = quantize(torch.ones(2, 8), WeightSpec("int4"))
print(quantized.computed_by())
"""
    assert run("reference", script) == (0, "reference\n")
