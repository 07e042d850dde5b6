"""Facts of the machine that times are held against."""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path

import torch

# Larger than the caches of the machines at hand, so that a pass over it reads memory.
_PROBE_NBYTES = 768 * 1024**2
_PROBE_COLS = 4096


def cpu_name() -> str:
    """The processor's brand string where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_nbytes() -> int | None:
    """Memory that can be had without swapping, or None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def read_bandwidth(rounds: int = 5) -> float:
    """Bytes a second that torch's threads together read from memory: the median of some passes over a large buffer.

    A pass is a product of an fp32 matrix and a vector that stays in cache, the fastest reader that torch has.
    """
    buffer, vector = torch.zeros(_PROBE_NBYTES // 4 // _PROBE_COLS, _PROBE_COLS), torch.ones(_PROBE_COLS)
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        buffer @ vector
        times.append(time.perf_counter() - start)
    return buffer.nbytes / statistics.median(times[1:])
