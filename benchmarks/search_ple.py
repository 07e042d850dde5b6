"""Choose the window and the half-life of `w-lrfu`, on traces that `test_ple.py` does not report.

    python benchmarks/search_ple.py

The traces are the first halves of the real token ids, of which the benchmark judges the second, the calibration text
as the small model's tokens, and Zipf with exponents between those of the benchmark. The first half of each warms the
cache. What is best by the mean hit rate over all traces and capacities stands in `epic_quant/ple/residency.py`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from tabulate import tabulate

from epic_quant.checkpoint import Checkpoint
from epic_quant.ple import simulation, traces
from epic_quant.ple.residency import HALF_LIFE_CAPACITIES, WINDOW_SHARE, Residency
from epic_quant.text import text_ids

MODEL = Path(__file__).parent / "mini_gemma4"
REAL_IDS = Path(__file__).parent / "facts" / "traces" / "gemma3-tokens.npz"
TABLE_ROWS = 262_144
ZIPF_TOKENS = 60_000
WINDOW_SHARES = (20, 10, 5, 3)  # one row of so many is in the window
HALF_LIVES = (2, 8, 32, 128)  # capacities


def main() -> None:
    """Print the mean hit rate of every setting, best first."""
    with Checkpoint.open(MODEL) as checkpoint:
        tokens = text_ids(checkpoint, MODEL / "calibration.txt")
    cases = [
        *((ids[: len(ids) // 2], (500, 1000, 2000)) for ids in traces.load_texts(REAL_IDS).values()),
        (tokens, (50, 200, 500, 1000)),
        (traces.zipf(0.9, ZIPF_TOKENS, TABLE_ROWS, 7), (1000, 5000)),
        (traces.zipf(1.1, ZIPF_TOKENS, TABLE_ROWS, 8), (1000, 5000)),
    ]
    rows = []
    for share, half_life in itertools.product(WINDOW_SHARES, HALF_LIVES):
        rates = []
        for trace, capacities in cases:
            warm = len(trace) // 2
            for capacity in capacities:
                window = capacity // share
                none = np.arange(0)
                residency = Residency(TABLE_ROWS, none, window, capacity - window, half_life * capacity)
                rates.append(simulation.hits(residency, trace, warm) / (len(trace) - warm))
        used = "in use" if (share, half_life) == (WINDOW_SHARE, HALF_LIFE_CAPACITIES) else ""
        rows.append((float(np.mean(rates)), f"1/{share}", half_life, *rates, used))
    rows.sort(reverse=True)
    headers = ["mean", "window", "half-life", *(str(size) for _, sizes in cases for size in sizes), ""]
    print(tabulate(rows, headers=headers, floatfmt=".4f"))


if __name__ == "__main__":
    main()
