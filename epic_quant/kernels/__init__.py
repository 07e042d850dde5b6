"""The hot loops over raw buffers, in C++, each beside a plain torch reference elsewhere that says what it computes.

The native module is built when the package is installed, where there is a compiler. `EPIC_QUANT_ISA` forces an
instruction set, or `reference`, which is torch alone.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

from epic_quant.errors import KernelError

REFERENCE = "reference"


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
