"""Windows of tokens out of a text."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import TokenError
from epic_quant.gemma4.config import TextConfig
from epic_quant.text import token_windows


@pytest.fixture
def word_checkpoint(toy, tmp_path):
    """The toy checkpoint with a tokenizer of ten words, the digits."""
    vocab = {str(number): number for number in range(10)} | {"<unk>": 10}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with Checkpoint.open(toy("e4b"), tokenizer=tmp_path / "tokenizer.json") as checkpoint:
        yield checkpoint


def write(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_window_begins_with_bos_and_no_token_is_left_out(word_checkpoint, tmp_path):
    bos = TextConfig.read(word_checkpoint).bos_token_id
    windows = token_windows(word_checkpoint, write(tmp_path, "0 1 3 4 5 6 7"), 2, 4)
    assert torch.equal(windows, torch.tensor([[bos, 0, 1, 3], [bos, 4, 5, 6]]))


def test_a_text_that_is_too_short_is_refused(word_checkpoint, tmp_path):
    with pytest.raises(TokenError, match="5 tokens, but 2 windows of 4 need 6"):
        token_windows(word_checkpoint, write(tmp_path, "1 2 3 4 5"), 2, 4)


def test_a_text_that_is_not_there_is_refused(word_checkpoint, tmp_path):
    with pytest.raises(TokenError, match="cannot be read as UTF-8"):
        token_windows(word_checkpoint, tmp_path / "none.txt", 1, 4)


def test_a_text_that_is_not_utf8_is_refused(word_checkpoint, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TokenError, match="cannot be read as UTF-8"):
        token_windows(word_checkpoint, tmp_path / "latin.txt", 1, 4)


def test_a_missing_tokenizer_is_named_with_what_to_do(toy_checkpoint, tmp_path):
    with pytest.raises(TokenError, match=r"no tokenizer\.json .* --tokenizer"):
        token_windows(toy_checkpoint, write(tmp_path, "1"), 1, 2)


def test_a_file_that_is_no_tokenizer_is_refused(word_checkpoint, tmp_path):
    word_checkpoint.tokenizer_path.write_text("{}", encoding="utf-8")
    with pytest.raises(TokenError, match="not a tokenizer"):
        token_windows(word_checkpoint, write(tmp_path, "1"), 1, 2)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(word_checkpoint, tmp_path):
    size = TextConfig.read(word_checkpoint).vocab_size
    vocab = {str(number): number for number in range(size + 1)}
    Tokenizer(models.WordLevel(vocab, unk_token="0")).save(str(word_checkpoint.tokenizer_path))
    with pytest.raises(TokenError, match=f"{size + 1} tokens, but the model has {size}"):
        token_windows(word_checkpoint, write(tmp_path, "1"), 1, 2)


def test_a_tokenizer_without_bos_is_refused(word_checkpoint, tmp_path):
    bos = TextConfig.read(word_checkpoint).bos_token_id
    vocab = {str(number): number for number in range(10) if number != bos}
    Tokenizer(models.WordLevel(vocab, unk_token="0")).save(str(word_checkpoint.tokenizer_path))
    with pytest.raises(TokenError, match="no token 2, which is the model's BOS"):
        token_windows(word_checkpoint, write(tmp_path, "1"), 1, 2)
