"""Facts of the machine that times depend on."""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path

import torch

from epic_quant.kernels import sum_of

# Larger than the caches of the machines at hand, so that a pass over it reads memory.
_PROBE_NBYTES = 768 * 1024**2


def cpu_name() -> str:
    """The processor's brand string where the system reports it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_nbytes() -> int | None:
    """Memory that can be had without swapping, or None where the system does not report it."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def read_bandwidth(rounds: int = 5) -> float:
    """Bytes a second that torch's threads together read from memory: the median of some passes over a large buffer.

    A pass adds its words up, natively where it can, which does nothing but read.
    """
    # Ones, since memory that nothing was written to is one page of zeros, in the cache.
    buffer = torch.ones(_PROBE_NBYTES // 8, dtype=torch.int64)
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        sum_of(buffer)
        times.append(time.perf_counter() - start)
    return buffer.nbytes / statistics.median(times[1:])
