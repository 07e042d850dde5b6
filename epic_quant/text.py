"""A text file as token ids, and as windows of them, under the checkpoint's own tokenizer."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import TokenError
from epic_quant.files import open_text, read_text
from epic_quant.gemma4.config import TextConfig

Ids = np.ndarray[tuple[int], np.dtype[np.int64]]

# Gemma's name of the token that begins every text.
BOS = "<bos>"

# A tokenizer with fewer of the model's tokens is another model's; a text with fewer tokens that the tokenizer has a
# word for is of another language or none. Neither gives a number that says anything about the model.
_LEAST_VOCABULARY = _LEAST_KNOWN = 0.5

# Characters of a text that are encoded at a time, and encoded beside these for what they make of their neighbours.
_PIECE, _MARGIN = 65_536, 256
# Before white space words end, and with them tokens. Gemma's tokenizer writes a space as ▁, so that is white space too.
_BORDER = re.compile(r".*[^\s▁](?=[ \n])", re.DOTALL)


def open_tokenizer(checkpoint: Checkpoint, config: TextConfig) -> Tokenizer:
    """The checkpoint's `tokenizer.json`, which neither cuts nor pads a text, nor encodes it by chance.

    Raises TokenError where there is none, or it is another model's: without Gemma's `<bos>` in the place of the model's
    BOS, or with less than half as many tokens as the model has.
    """
    path = checkpoint.tokenizer_path
    if path is None:
        raise TokenError(f"{checkpoint.source}: no tokenizer.json beside it; copy it there or name it with --tokenizer")
    try:
        tokenizer = _parse(read_text(path))
    except Exception as error:  # The library raises plain Exception on every malformed file.
        raise TokenError(f"{path}: not a tokenizer that `tokenizers` reads: {error}") from error
    size = tokenizer.get_vocab_size()
    if size < _LEAST_VOCABULARY * config.vocab_size:
        raise TokenError(f"{path}: {size} tokens, but the model has {config.vocab_size}; is it another model's?")
    bos = tokenizer.id_to_token(config.bos_token_id)
    if bos != BOS:
        expected = f"expected {BOS!r}, the model's BOS"
        raise TokenError(f"{path}: token {config.bos_token_id} is {bos!r}, {expected}; is it another model's?")
    return tokenizer


# Every text of a run needs the same one, and Gemma's takes a second to read.
@lru_cache(maxsize=1)
def _parse(json_text: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json_text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def text_ids(checkpoint: Checkpoint, path: Path, most: int | None = None) -> Ids:
    """The tokens of a text, int64 [n]: all, or the first `most`, for which no more of it is read than they need.

    A BOS that the text itself begins with is left out, and the tokenizer's post-processor adds none: who needs one puts
    it there. Raises TokenError where the text cannot be read, has a token that the model lacks, or consists mostly of
    what the tokenizer has no word for.
    """
    config = TextConfig.read(checkpoint)
    tokenizer = open_tokenizer(checkpoint, config)
    pieces: list[Ids] = []
    try:
        with open_text(path) as file:
            for piece in _encoded(tokenizer, file):
                pieces.append(piece)
                if most is not None and sum(map(len, pieces)) > most:
                    break
    except (OSError, ValueError) as error:
        raise TokenError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except Exception as error:  # The library raises plain Exception, as on a word where it has no unknown token.
        raise TokenError(f"{path}: {checkpoint.tokenizer_path} cannot encode it: {error}") from error
    ids = np.concatenate(pieces)
    unknown = np.isin(ids, _unknown_ids(tokenizer)).sum()
    if unknown > (1 - _LEAST_KNOWN) * len(ids):
        raise TokenError(
            f"{path}: {unknown} of {len(ids)} tokens are unknown to the tokenizer {checkpoint.tokenizer_path}, "
            "or bytes of what is; is it another model's, or the text of another language?"
        )
    if len(ids) and ids[0] == config.bos_token_id:
        ids = ids[1:]
    ids = ids[:most]
    num_tokens = min(config.vocab_size, config.ple_vocab_size) if config.ple_dim else config.vocab_size
    if len(outside := ids[ids >= num_tokens]):
        token = tokenizer.id_to_token(int(outside[0]))
        raise TokenError(f"{path}: {token!r} is token {outside[0]} of the tokenizer, but the model has {num_tokens}")
    return ids


def token_windows(
    checkpoint: Checkpoint,
    path: Path,
    num_windows: int,
    window_tokens: int,
    *,
    skip: int = 0,
    least: int | None = None,
) -> Tensor:
    """Windows of a text: int64 [num_windows, window_tokens], each BOS and `window_tokens` - 1 of its tokens.

    They begin after `skip` tokens. With `least`, a shorter text gives fewer windows, but so many at least. Gemma's
    perplexity means nothing without BOS, so each has one. Raises TokenError where the text is too short, and as
    `text_ids`.
    """
    own = window_tokens - 1
    ids = text_ids(checkpoint, path, skip + num_windows * own)
    if least is not None:
        num_windows = min(num_windows, max(least, (len(ids) - skip) // own))
    needed = skip + num_windows * own
    if len(ids) < needed:
        after = f" after {skip} others" if skip else ""
        raise TokenError(
            f"{path}: {len(ids)} tokens, but {num_windows} windows of {window_tokens}{after} need {needed}; "
            "take a longer text or fewer, shorter windows"
        )
    windows = torch.from_numpy(ids[skip:needed]).view(num_windows, own)
    return torch.nn.functional.pad(windows, (1, 0), value=TextConfig.read(checkpoint).bos_token_id)


def _encoded(tokenizer: Tokenizer, file: TextIO) -> Iterator[Ids]:
    """The ids of a text piece by piece: together those that it has when it is encoded as a whole.

    A piece begins and ends where a word does. It is encoded with some of the text on both sides, whose tokens are left
    out, since what a tokenizer makes of a word may depend on what is beside it.
    """
    text, begin, asked = "", 0, _PIECE
    while True:
        read = file.read(asked)
        text += read
        is_last = len(read) < asked
        end = len(text) if is_last else max(begin, _border(text, len(text) - _MARGIN))
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ends = [token_end for _, token_end in encoding.offsets]
        yield np.array(encoding.ids[bisect_right(ends, begin) : bisect_right(ends, end)], dtype=np.int64)
        if is_last:
            return
        # Text without a border is encoded anew with twice as much of it.
        asked = _PIECE if end > begin else len(text)
        beside = _border(text, end - _MARGIN)
        text, begin = text[beside:], end - beside


def _border(text: str, limit: int) -> int:
    """The last border between words in the first `limit` characters; 0 where there is none."""
    found = _BORDER.match(text, 0, max(limit, 0))
    return found.end() if found else 0


def _unknown_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of what is no word of the tokenizer: its unknown token, and single bytes."""
    names = ["<unk>", getattr(tokenizer.model, "unk_token", None), *(f"<0x{byte:02X}>" for byte in range(256))]
    ids = (tokenizer.token_to_id(name) for name in names if name is not None)
    return [found for found in ids if found is not None]
