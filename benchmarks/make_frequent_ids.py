"""Make the list of generally frequent ids that is shipped with the package, for `PLERowCache(initial_ids=…)`.

    python benchmarks/make_frequent_ids.py

It has the ids of the first halves of the real texts, which count alike; `test_ple.py` judges by the second halves.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import epic_quant.ple
from epic_quant.ple import simulation, traces

REAL_IDS = Path(__file__).parent / "facts" / "traces" / "gemma3-tokens.npz"


def main() -> None:
    """Write the list into the package's folder."""
    halves = [ids[: len(ids) // 2] for ids in traces.load_texts(REAL_IDS).values()]
    ids = simulation.by_frequency(np.concatenate(halves))
    np.save(Path(epic_quant.ple.__file__).with_name("frequent_ids.npy"), ids.astype(np.int32))


if __name__ == "__main__":
    main()
