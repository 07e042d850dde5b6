"""A text file as windows of token ids, under the checkpoint's own tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import TokenError
from epic_quant.gemma4.config import TextConfig


def open_tokenizer(checkpoint: Checkpoint, config: TextConfig) -> Tokenizer:
    """The checkpoint's `tokenizer.json`.

    Raises TokenError where there is none, or where it has ids that the model's table has not, or not the model's BOS.
    """
    path = checkpoint.tokenizer_path
    if path is None:
        raise TokenError(f"{checkpoint.source}: no tokenizer.json beside it; copy it there or name it with --tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises plain Exception on every malformed file.
        raise TokenError(f"{path}: not a tokenizer that `tokenizers` reads: {error}") from error
    size = tokenizer.get_vocab_size()
    if size > config.vocab_size:
        raise TokenError(f"{path}: {size} tokens, but the model has {config.vocab_size}")
    if tokenizer.id_to_token(config.bos_token_id) is None:
        raise TokenError(f"{path}: no token {config.bos_token_id}, which is the model's BOS; is it another model's?")
    return tokenizer


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
    perplexity means nothing without BOS, so it is put there, whatever the tokenizer's post-processor does.
    Raises TokenError where the text cannot be read or is too short.
    """
    config = TextConfig.read(checkpoint)
    tokenizer = open_tokenizer(checkpoint, config)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    try:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # The library raises plain Exception where a tokenizer lacks what its text needs.
        raise TokenError(f"{checkpoint.tokenizer_path}: cannot encode {path}: {error}") from error
    own = window_tokens - 1
    if least is not None:
        num_windows = min(num_windows, max(least, (len(ids) - skip) // own))
    needed = skip + num_windows * own
    if len(ids) < needed:
        after = f" after {skip} others" if skip else ""
        raise TokenError(
            f"{path}: {len(ids)} tokens, but {num_windows} windows of {window_tokens}{after} need {needed}; "
            "take a longer text or fewer, shorter windows"
        )
    windows = torch.tensor(ids[skip:needed]).view(num_windows, own)
    return torch.nn.functional.pad(windows, (1, 0), value=config.bos_token_id)
