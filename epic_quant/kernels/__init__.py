"""The hot loops over raw buffers, in C++, each with a plain torch reference elsewhere that defines its result.

`matrix` has what is done with a stored matrix. The native module is built when the package is installed, where there is
a compiler. `EPIC_QUANT_ISA` forces an instruction set, or `reference`, which is torch alone.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from epic_quant.errors import KernelError

REFERENCE = "reference"

# What products take activations as.
ACTIVATIONS = ("fp32", "int8")


def _load() -> ModuleType | None:
    try:
        from epic_quant.kernels import _native
    except ImportError:
        return None
    return _native


_NATIVE = _load()


def isas() -> list[str]:
    """What this installation can compute with on this machine, fastest first; the last is the torch reference."""
    return [*(_NATIVE.isas() if _NATIVE else ()), REFERENCE]


@functools.cache
def isa() -> str:
    """The one it computes with: the fastest, or that which `EPIC_QUANT_ISA` names.

    Raises KernelError where that is none of `isas()`.
    """
    forced = os.environ.get("EPIC_QUANT_ISA")
    if not forced:
        return isas()[0]
    if forced not in isas():
        raise KernelError(f"EPIC_QUANT_ISA is {forced!r}, but this machine has: {', '.join(isas())}")
    return forced


def is_native() -> bool:
    """Whether this process computes with native kernels, and not with torch alone."""
    return isa() != REFERENCE


def description() -> str:
    """One line for people: the instruction set in use, and those available."""
    if _NATIVE is None:
        return "torch reference (the native module is not built; a C++17 compiler and a new install build it)"
    threads = {"openmp": "torch's threads", "own": "threads of its own"}[_NATIVE.threads_of()]
    return f"{isa()} of {', '.join(isas())}; {threads}"


def sum_of(words: Tensor) -> int:
    """The sum of int64 `words` modulo 2^64, read once by torch's number of threads as fast as memory gives them.

    Raises KernelError where `words` is not contiguous int64 in memory.
    """
    if words.dtype is not torch.int64 or words.device.type != "cpu" or not words.is_contiguous():
        raise KernelError(f"words are {words.dtype} on {words.device}, expected contiguous torch.int64")
    if _NATIVE is None or not is_native():
        return int(words.sum()) % 2**64
    return int(_NATIVE.sum_of_words(words.data_ptr(), words.numel(), torch.get_num_threads()))
