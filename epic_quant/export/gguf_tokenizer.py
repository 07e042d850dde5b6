"""The tokenizer in GGUF's metadata, as llama.cpp's `gemma4` reads it: merges over raw UTF-8, with byte tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import TokenError
from epic_quant.files import read_text
from epic_quant.gemma4.config import TextConfig
from epic_quant.text import open_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter, TokenType

# The score of every token; a tokenizer of merges does not read it.
_SCORE = -1000.0
# Special tokens that stay in the text: what reads a chat looks for them there. llama.cpp's converter names the same.
_VISIBLE = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)


def add_tokenizer(writer: GGUFWriter, checkpoint: Checkpoint, config: TextConfig) -> None:
    """Add the tokens by id with their types, merges, special tokens and chat template: all that lies beside the file.

    Raises TokenError where there is no tokenizer, where it is another model's or of another kind than Gemma's.
    """
    from gguf import SpecialVocab

    tokenizer = open_tokenizer(checkpoint, config)
    path = checkpoint.tokenizer_path
    assert path is not None
    content = json.loads(read_text(path))
    kind = content["model"]
    spaced = tokenizer.normalizer.normalize_str("a b") if tokenizer.normalizer else ""
    if kind.get("type") != "BPE" or not (kind.get("merges") and kind.get("byte_fallback")) or spaced != "a▁b":
        raise TokenError(f"{path}: not of Gemma's kind, which llama.cpp reads: merges, spaces as ▁, bytes as tokens")
    if path.name != "tokenizer.json":
        raise TokenError(f"{path}: expected the name tokenizer.json, since what is beside it belongs to it")
    tokens = list(_tokens(path, content, config.vocab_size))
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([_SCORE] * len(tokens))
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_add_space_prefix(False)
    try:
        SpecialVocab(path.parent, load_merges=True).add_to_gguf(writer)
    except Exception as error:  # What a malformed file makes of its code.
        raise TokenError(f"{path.parent}: its special tokens and chat template cannot be read: {error}") from error
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_add_bos_token(True)


def _tokens(path: Path, content: dict[str, Any], size: int) -> Iterator[tuple[str, TokenType]]:
    """Text and type of every row of the embedding; of those that the tokenizer has no token for too."""
    from gguf import TokenType

    ids: dict[str, int] = content["model"]["vocab"]
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    texts = {number: text for text, number in ids.items()} | {token["id"]: text for text, token in added.items()}
    if max(texts) >= size:
        raise TokenError(f"{path}: {texts[max(texts)]!r} is token {max(texts)}, but the model has {size}")
    for number in range(size):
        if number not in texts:
            yield f"[PAD{number}]", TokenType.UNUSED
            continue
        text = texts[number]
        if text in _VISIBLE or (text in added and text not in ids and not added[text]["special"]):
            yield text, TokenType.USER_DEFINED
        elif text in added and added[text]["special"]:
            yield text, TokenType.CONTROL
        else:
            is_byte = re.fullmatch("<0x[0-9A-Fa-f]{2}>", text)
            yield text, TokenType.BYTE if is_byte else TokenType.NORMAL
