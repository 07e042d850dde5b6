"""A text as tokens, and as windows of them."""

import codecs
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from epic_quant import text
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import TokenError
from epic_quant.text import text_ids, token_windows

SMALL_MODEL = Path(__file__).parents[1] / "benchmarks" / "mini_gemma4"


@pytest.fixture
def with_tokenizer(toy, tmp_path):
    """`with_tokenizer(tokenizer)`: the toy checkpoint, open, with this one beside it."""
    opened = []

    def use(tokenizer):
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
        opened.append(Checkpoint.open(toy("e4b"), tokenizer=path))
        return opened[-1]

    yield use
    for checkpoint in opened:
        checkpoint.close()


@pytest.fixture
def numbered(with_tokenizer, numbers):
    """The toy checkpoint with the tokenizer of numbers."""
    return with_tokenizer(numbers)


@pytest.fixture(scope="module")
def small_model():
    with Checkpoint.open(SMALL_MODEL) as checkpoint:
        yield checkpoint


def write(tmp_path, content):
    path = tmp_path / "text.txt"
    path.write_text(content, encoding="utf-8", newline="")
    return path


def word_level(words):
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def test_every_window_begins_with_bos_and_no_token_is_left_out(numbered, tmp_path):
    windows = token_windows(numbered, write(tmp_path, "0 1 13 14 15 16 17"), 2, 4)
    assert torch.equal(windows, torch.tensor([[2, 0, 1, 13], [2, 14, 15, 16]]))


def test_windows_begin_after_what_is_skipped_and_a_shorter_text_gives_fewer(numbered, tmp_path):
    path = write(tmp_path, " ".join(map(str, range(10, 20))))
    windows = token_windows(numbered, path, 5, 4, skip=3, least=1)
    assert torch.equal(windows, torch.tensor([[2, 13, 14, 15], [2, 16, 17, 18]]))
    assert torch.equal(token_windows(numbered, path, 1, 4, skip=3, least=1), windows[:1])


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_and_the_kind_of_line_breaks_are_no_text(ending, mark, small_model, tmp_path):
    lines = ["def f(x):", "    return x", "", "# end"]
    expected = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json")).encode("\n".join(lines)).ids[1:]
    assert text_ids(small_model, write(tmp_path, mark + ending.join(lines))).tolist() == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_text_in_utf16_is_refused_in_one_line(encoding, numbered, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("5 6 7".encode(encoding))
    with pytest.raises(TokenError, match=r"text\.txt: .* UTF-16 or UTF-32.*; save it as UTF-8"):
        text_ids(numbered, path)


def test_a_tokenizer_file_may_begin_with_a_byte_order_mark(numbered, tmp_path):
    path = numbered.tokenizer_path
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert text_ids(numbered, write(tmp_path, "5 6")).tolist() == [5, 6]


def test_truncation_padding_and_dropout_of_the_tokenizer_file_do_nothing(tmp_path, small_model):
    """Dropout leaves merges out by chance."""
    tokenizer = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    path = SMALL_MODEL / "eval.txt"
    expected = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=100_000)
    changed = json.loads(tokenizer.to_str())
    changed["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
    with Checkpoint.open(SMALL_MODEL, tokenizer=tmp_path / "tokenizer.json") as checkpoint:
        assert text_ids(checkpoint, path).tolist() == expected
        assert token_windows(checkpoint, path, 2, 33).tolist() == [[2, *expected[:32]], [2, *expected[32:64]]]


@pytest.mark.parametrize("begins", ["", "<bos>"])
@pytest.mark.parametrize("template", ["<bos> $A", "<bos> <bos> $A", "<bos> $A <eos>", "$A"])
def test_bos_is_there_once_whatever_the_post_processor_and_the_text_add(template, begins, tmp_path):
    tokenizer = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with Checkpoint.open(SMALL_MODEL, tokenizer=tmp_path / "tokenizer.json") as checkpoint:
        own = tokenizer.encode("return", add_special_tokens=False).ids
        windows = token_windows(checkpoint, write(tmp_path, f"{begins}return"), 1, 1 + len(own))
        assert windows.tolist() == [[2, *own]]
        assert text_ids(checkpoint, write(tmp_path, f"{begins}return")).tolist() == own


WORDS = st.sampled_from(["return", "self", "naïve", "日本", "🙂", "<bos>", "<eos>", "▁", "▁▁x", ")", "0", "e\u0301"])
SPACES = st.sampled_from([" ", "  ", "\n", "\n\n", "\n    ", "\t", "\u00a0", ""])


@cache
def own_tokenizer(prepends):
    """The small model's, which may put a ▁ before what it encodes."""
    tokenizer = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    if prepends:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


@settings(max_examples=300)
@given(
    parts=st.lists(st.tuples(WORDS | st.text(max_size=4), SPACES), max_size=40).map(
        lambda pairs: "".join(word + space for word, space in pairs)
    ),
    size=st.integers(1, 40),
    margin=st.integers(0, 20),
    most=st.none() | st.integers(1, 60),
    prepends=st.booleans(),
)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(parts, size, margin, most, prepends, tmp_path_factory):
    """However small the pieces, with nothing beside them; with that, also where a ▁ is put before what is encoded."""
    tokenizer = own_tokenizer(prepends)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(parts, encoding="utf-8", newline="\n")
    whole = path.read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, path.open(encoding="utf-8") as file:
        patch.setattr(text, "_PIECE", size)
        patch.setattr(text, "_MARGIN", margin + 12 * prepends)
        found = [token for piece in text._encoded(tokenizer, file) for token in piece]
    assert found == tokenizer.encode(whole, add_special_tokens=False).ids


def test_no_more_of_a_text_is_encoded_than_is_needed(small_model, tmp_path, monkeypatch):
    path = write(tmp_path, (SMALL_MODEL / "eval.txt").read_text(encoding="utf-8") * 3)
    encoded = []

    class Counting:
        def __init__(self, tokenizer):
            self._tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self._tokenizer, name)

        def encode(self, content, **options):
            encoded.append(len(content))
            return self._tokenizer.encode(content, **options)

    opened = text.open_tokenizer
    monkeypatch.setattr(text, "open_tokenizer", lambda *arguments: Counting(opened(*arguments)))
    token_windows(small_model, path, 3, 512)
    assert sum(encoded) <= 2 * 65_536
    encoded.clear()
    assert len(text_ids(small_model, path)) > 200_000
    assert sum(encoded) < 1.1 * path.stat().st_size
    assert max(encoded) < 100_000


def test_a_text_that_is_too_short_is_refused(numbered, tmp_path):
    with pytest.raises(TokenError, match="5 tokens, but 2 windows of 4 need 6"):
        token_windows(numbered, write(tmp_path, "11 12 13 14 15"), 2, 4)
    with pytest.raises(TokenError, match="0 tokens, but 1 windows of 4 need 3"):
        token_windows(numbered, write(tmp_path, ""), 1, 4)


def test_a_text_that_is_not_there_is_refused(numbered, tmp_path):
    with pytest.raises(TokenError, match="cannot be read as UTF-8"):
        token_windows(numbered, tmp_path / "none.txt", 1, 4)


def test_a_text_that_is_not_utf8_is_refused(numbered, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TokenError, match="cannot be read as UTF-8"):
        token_windows(numbered, tmp_path / "latin.txt", 1, 4)


def test_a_missing_tokenizer_is_named_with_what_to_do(toy_checkpoint, tmp_path):
    with pytest.raises(TokenError, match=r"no tokenizer\.json .* --tokenizer"):
        token_windows(toy_checkpoint, write(tmp_path, "1"), 1, 2)


def test_a_file_that_is_no_tokenizer_is_refused(numbered, tmp_path):
    numbered.tokenizer_path.write_text("{}", encoding="utf-8")
    with pytest.raises(TokenError, match="not a tokenizer"):
        token_windows(numbered, write(tmp_path, "1"), 1, 2)


def test_a_token_that_the_model_lacks_is_refused_only_where_a_text_uses_it(with_tokenizer, numbers, tmp_path):
    words = [numbers.id_to_token(number) for number in range(120)]
    checkpoint = with_tokenizer(word_level([*words, "<image>", "image"]))
    path = write(tmp_path, "11 12 13 image 14")
    assert token_windows(checkpoint, path, 1, 4).tolist() == [[2, 11, 12, 13]]
    with pytest.raises(TokenError, match=r"text\.txt: 'image' is token 121 of the tokenizer, but the model has 120"):
        token_windows(checkpoint, path, 1, 5)


def test_a_tokenizer_of_far_fewer_tokens_than_the_model_has_is_refused(with_tokenizer, tmp_path):
    checkpoint = with_tokenizer(word_level(["0", "1", "<bos>", *map(str, range(3, 59))]))
    with pytest.raises(TokenError, match=r"tokenizer\.json: 59 tokens, but the model has 120; is it another model's\?"):
        token_windows(checkpoint, write(tmp_path, "11"), 1, 2)


@pytest.mark.parametrize("first", ["0", "<bos>"])
def test_a_tokenizer_whose_bos_is_another_is_refused(first, with_tokenizer, tmp_path):
    checkpoint = with_tokenizer(word_level([first, *map(str, range(1, 120))]))
    with pytest.raises(TokenError, match=r"token 2 is '2', expected '<bos>', the model's BOS; is it another model's\?"):
        token_windows(checkpoint, write(tmp_path, "11"), 1, 2)


def test_a_text_of_mostly_unknown_words_is_refused(numbered, tmp_path):
    assert token_windows(numbered, write(tmp_path, "unheard 11 12 word"), 1, 5).tolist() == [[2, 3, 11, 12, 3]]
    with pytest.raises(TokenError, match=r"text\.txt: 3 of 5 tokens are unknown to the tokenizer .*tokenizer\.json"):
        token_windows(numbered, write(tmp_path, "unheard 11 12 word again"), 1, 2)


def test_a_text_of_mostly_single_bytes_is_refused_however_few_tokens_are_asked_for(small_model, tmp_path):
    with pytest.raises(TokenError, match="or bytes of what is; is it another model's, or the text of another language"):
        token_windows(small_model, write(tmp_path, "# a comment\n" + "한국어 " * 50), 1, 2)
    assert token_windows(small_model, write(tmp_path, "© 한국어\n" + "return self\n" * 50), 1, 2).shape == (1, 2)


def test_a_word_that_a_tokenizer_without_an_unknown_token_lacks_is_refused(with_tokenizer, numbers, tmp_path):
    vocab = {numbers.id_to_token(number): number for number in range(120)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="none"))
    with pytest.raises(TokenError, match=r"text\.txt: .*tokenizer\.json cannot encode it: .*"):
        token_windows(with_tokenizer(tokenizer), write(tmp_path, "a"), 1, 2)
