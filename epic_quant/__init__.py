"""Measure how to compress a Gemma 4 checkpoint: the bytes, errors and speed of every policy.

Names are loaded when first used (PEP 562), so that a report or `--help` never imports torch.
"""

from __future__ import annotations

import importlib
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epic_quant.checkpoint import Checkpoint
    from epic_quant.gemma4.model import TextModel
    from epic_quant.kv import KVCache
    from epic_quant.metrics import relative_l2
    from epic_quant.ple import PLERowCache
    from epic_quant.policy import PolicyWeights
    from epic_quant.quant import quantize
    from epic_quant.quant.linear import linear
    from epic_quant.spec import KVSpec, PLESpec, PolicySpec, WeightSpec

# `python -m epic_quant.X`, which Python names so while it looks for X: Ctrl-C ends it without a traceback until
# `command_line.leave` has taken over, since torch alone takes seconds to import.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

__version__ = "0.1.0"

_HOME = {
    "Checkpoint": "epic_quant.checkpoint",
    "KVCache": "epic_quant.kv",
    "KVSpec": "epic_quant.spec",
    "PLERowCache": "epic_quant.ple",
    "PLESpec": "epic_quant.spec",
    "PolicySpec": "epic_quant.spec",
    "PolicyWeights": "epic_quant.policy",
    "TextModel": "epic_quant.gemma4.model",
    "WeightSpec": "epic_quant.spec",
    "linear": "epic_quant.quant",
    "quantize": "epic_quant.quant",
    "relative_l2": "epic_quant.metrics",
}

__all__ = [
    "Checkpoint",
    "KVCache",
    "KVSpec",
    "PLERowCache",
    "PLESpec",
    "PolicySpec",
    "PolicyWeights",
    "TextModel",
    "WeightSpec",
    "linear",
    "quantize",
    "relative_l2",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
