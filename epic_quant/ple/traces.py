"""Streams of token ids to evaluate a cache on: int64 [n]."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from epic_quant.errors import TokenError
from epic_quant.ple.residency import Ids

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


def words(num_tokens: int, table_rows: int, seed: int, files: Iterable[Path] | None = None) -> Ids:
    """A stand-in for a large vocabulary: the words and signs of source files, each under an id of its own.

    The files, this Python's standard library unless given, come in a seeded order, whole, until there are `num_tokens`.
    Ids are shuffled over the table; words beyond its size share ids. Raises TokenError where there is no text.
    """
    random = np.random.default_rng(seed)
    paths = sorted(_standard_library() if files is None else files)
    id_of: dict[str, int] = {}
    ids: list[int] = []
    for index in random.permutation(len(paths)):
        text = paths[index].read_text(encoding="utf-8", errors="replace")
        ids += [id_of.setdefault(word, len(id_of)) for word in re.findall(r"\w+|[^\w\s]", text)]
        if len(ids) >= num_tokens:
            break
    if not ids:
        raise TokenError("no source files to take words from")
    return np.take(random.permutation(table_rows), np.array(ids[:num_tokens]) % table_rows)


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


def _standard_library() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    return [path for path in folder.rglob("*.py") if "site-packages" not in path.parts]
