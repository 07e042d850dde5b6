"""Streams of token ids to evaluate a cache on: int64 [n]."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from epic_quant.errors import TokenError
from epic_quant.ple.residency import Ids

_FREQUENT_IDS = Path(__file__).with_name("frequent_ids.npy")

# The original's: tokens drawn from the ids that it keeps hot, and the share of such tokens.
ORIGINAL_HOT_ROWS = 5000
ORIGINAL_HOT_SHARE = 0.85


def original(num_tokens: int, table_rows: int, seed: int) -> Ids:
    """The original's trace: 85% uniform over the lowest 5000 ids, 15% uniform over the rest."""
    random = np.random.default_rng(seed)
    hot = random.integers(0, ORIGINAL_HOT_ROWS, num_tokens)
    cold = random.integers(ORIGINAL_HOT_ROWS, table_rows, num_tokens)
    return np.where(random.random(num_tokens) < ORIGINAL_HOT_SHARE, hot, cold)


def zipf(exponent: float, num_tokens: int, table_rows: int, seed: int) -> Ids:
    """Independent draws with probability in proportion to rank^-exponent, the ranks shuffled over all ids."""
    random = np.random.default_rng(seed)
    cumulative = np.cumsum(np.arange(1, table_rows + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(cumulative, random.random(num_tokens) * cumulative[-1], side="right")
    ids: Ids = np.take(random.permutation(table_rows), ranks)
    return ids


def frequent_ids() -> Ids:
    """Ids of Gemma's vocabulary of 262,144, the most frequent in English and Python source first.

    `benchmarks/make_frequent_ids.py` makes the list.
    """
    ids: Ids = np.load(_FREQUENT_IDS).astype(np.int64)
    return ids


def load_texts(path: Path) -> dict[str, Ids]:
    """The ids of several texts in a `.npz` file, by name."""
    with np.load(path) as texts:
        return {name: ids.astype(np.int64) for name, ids in texts.items()}


def load_ids(path: Path, table_rows: int) -> Ids:
    """The ids in a `.npy` file, flattened. Raises TokenError where there are none, or the table lacks one."""
    try:
        ids = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy's reader of headers lets errors of Python's own parser through.
        raise TokenError(f"{path}: cannot be read as a .npy array: {error}") from error
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
        raise TokenError(f"{path}: expected an array of integers, found {getattr(ids, 'dtype', type(ids).__name__)}")
    return check_trace(ids, table_rows, str(path))


def check_trace(ids: np.ndarray[tuple[int, ...], np.dtype[np.integer]], table_rows: int, name: str) -> Ids:
    """Integer ids as a trace; TokenError, naming it, where it is too short to be halved or the table lacks an id."""
    if ids.size < 2:
        raise TokenError(f"{name}: a trace of {ids.size} tokens; expected at least 2, half to warm the cache")
    wrong = ids[(ids < 0) | (ids >= table_rows)]
    if wrong.size:
        raise TokenError(f"{name}: token id {wrong.flat[0]} is out of range; the table has rows 0 to {table_rows - 1}")
    return ids.reshape(-1).astype(np.int64)
