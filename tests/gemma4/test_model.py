import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import ConfigError, TokenError
from epic_quant.gemma4.model import TextModel, attention_masks, begin, head
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.metrics import relative_l2
from epic_quant.quant import quantize
from epic_quant.spec import WeightSpec

TOYS = ["e4b", "e2b", "no_ple", "no_sharing", "one_layer", "all_full", "wide_ple", "other_rope"]


@pytest.fixture
def weights(toy, request) -> Iterator[CheckpointWeights]:
    """The weights of the toy that the test names, of `e4b` where it names none."""
    with Checkpoint.open(toy(getattr(request, "param", "e4b"))) as checkpoint:
        yield CheckpointWeights(checkpoint)


def theirs(model, token_ids) -> Tensor:
    # Without PLE `transformers` slices what it does not have at the first sharing layer, unless asked for states.
    return model(token_ids, output_hidden_states=True, use_cache=False).logits


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("ids", ["token_ids", "long_token_ids"])
@pytest.mark.parametrize(("weights", "name"), [(name, name) for name in TOYS], indirect=["weights"], ids=TOYS)
def test_logits_are_those_of_transformers(weights, name, reference, request, ids, dtype, limit):
    """On a batch of sequences longer than the window, and on one that attends in several blocks."""
    token_ids = request.getfixturevalue(ids)
    logits = TextModel(weights, dtype).logits(token_ids)
    assert logits.dtype == dtype
    assert relative_l2(logits, theirs(reference(name, dtype), token_ids)) <= limit


@pytest.mark.parametrize(("weights", "name"), [(name, name) for name in TOYS], indirect=["weights"], ids=TOYS)
def test_bf16_is_as_near_to_the_truth_as_transformers(weights, name, reference, token_ids):
    """Rounding differs, but is no larger than theirs by a tenth."""
    truth = theirs(reference(name, torch.float64), token_ids)
    ours = relative_l2(TextModel(weights, torch.bfloat16).logits(token_ids), truth)
    assert ours <= 1.1 * relative_l2(theirs(reference(name, torch.bfloat16), token_ids), truth)


def test_hidden_states_are_those_before_each_layer_and_after_the_last(weights, reference, token_ids):
    """One more than there are layers; the head of the last one is the model's logits."""
    model = TextModel(weights)
    ours = list(model.hidden_states(token_ids))
    expected = reference("e4b", torch.float32)(token_ids, output_hidden_states=True).hidden_states
    assert len(ours) == model.config.num_layers + 1
    for state, their_state in zip(ours[:-1], expected[:-1], strict=True):  # their last one is normed
        assert relative_l2(state, their_state) <= 1e-5
    assert torch.equal(head(weights, ours[-1]), model.logits(token_ids))


def test_logits_do_not_depend_on_later_tokens(weights, token_ids):
    """Causality: the logits of a prefix are the prefix of the logits."""
    model = TextModel(weights)
    assert relative_l2(model.logits(token_ids[:, :9]), model.logits(token_ids)[:, :9]) <= 1e-5


def test_tokens_may_be_of_any_integer_dtype(weights, token_ids):
    """They only name rows."""
    model = TextModel(weights)
    assert torch.equal(model.logits(token_ids.to(torch.uint8)), model.logits(token_ids))


def test_the_head_goes_a_few_tokens_or_a_slice_of_the_vocabulary_at_a_time(weights, token_ids, monkeypatch):
    """Both to the same logits, but for the order of additions."""
    *_, last = TextModel(weights).hidden_states(token_ids)
    whole = head(weights, last)
    by_token = torch.cat([head(weights, last[:, i : i + 5]) for i in range(0, 17, 5)], dim=1)
    monkeypatch.setattr("epic_quant.gemma4.model._HEAD_ROWS", 50)
    for logits in (by_token, head(weights, last)):
        assert logits.shape == whole.shape
        assert relative_l2(logits, whole) <= 1e-6


@pytest.mark.parametrize("start", [0, 5])
def test_masks_leave_the_window(weights, start):
    """Counted by hand: token q sees keys max(0, q - 5) to q on sliding layers of window 6, and 0 to q on full ones."""
    masks = attention_masks(weights.config, 9, start)
    for row, query in enumerate(range(start, start + 9)):
        assert (~masks["sliding_attention"][row]).nonzero().flatten().tolist() == list(
            range(max(0, query - 5), query + 1)
        )
        assert (~masks["full_attention"][row]).nonzero().flatten().tolist() == list(range(query + 1))


class PlainCache:
    """Keeps K and V as they are, of sliding layers only the newest window if asked to."""

    def __init__(self, config, windowed: bool) -> None:
        self._kept = {spec.index: spec.attention.sliding_window for spec in config.layers} if windowed else {}
        self.stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, layer, k, v):
        pairs = (
            zip(self.stored[layer], (k, v), strict=True)
            if layer in self.stored
            else ((x[..., :0, :], x) for x in (k, v))
        )
        whole = [torch.cat(pair, dim=-2) for pair in pairs]
        kept = self._kept.get(layer)
        self.stored[layer] = tuple(x if kept is None else x[..., -kept:, :] for x in whole)
        return whole[0], whole[1]


CHUNKS = {
    "at once": [17],
    "one by one": [1] * 17,
    "prefill, then decode": [9] + [1] * 8,
    "in chunks": [4, 5, 1, 7],
    # Here queries attend in several blocks.
    "long at once": [300],
    "long prefill, then decode": [298, 1, 1],
    "long in chunks": [70, 5, 1, 200, 24],
}


@pytest.mark.parametrize("windowed", [True, False], ids=["windowed", "all kept"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("weights", ["e4b", "e2b", "no_sharing"], indirect=True)
def test_a_lossless_cache_changes_nothing(weights, long_token_ids, chunks, windowed):
    """However the tokens come, nearly three windows of them or many more, logits are those of one forward."""
    model, ids = TextModel(weights), long_token_ids[:, : sum(chunks)]
    cache, parts, start = PlainCache(model.config, windowed), [], 0
    for chunk in ids.split(chunks, dim=1):
        parts.append(model.logits(chunk, cache, start))
        start += chunk.shape[1]
    assert relative_l2(torch.cat(parts, dim=1), model.logits(ids)) <= 1e-5


@pytest.mark.parametrize("tokens", [5, 17])
def test_attention_sees_what_the_cache_gives_back(weights, token_ids, tokens):
    """With every value lost the attention of all layers adds nothing, sharing layers included."""
    cache = PlainCache(weights.config, windowed=True)
    update = cache.update

    def without_values(layer, k, v):
        keys, values = update(layer, k, v)
        return keys, torch.zeros_like(values)

    cache.update = without_values
    ids = token_ids[:1, :tokens]
    hidden, forward = begin(weights, ids, cache=cache)
    expected, plain = begin(weights, ids)
    for spec in weights.config.layers:
        used = dict(weights.layer(spec.index))
        hidden = forward.layer(hidden, used, spec)
        used["self_attn.o_proj.weight"] = torch.zeros_like(used["self_attn.o_proj.weight"])
        expected = plain.layer(expected, used, spec)
    assert torch.equal(hidden, expected)


def test_only_kv_source_layers_reach_the_cache(weights, token_ids):
    """Sharing layers store nothing."""
    cache = PlainCache(weights.config, windowed=True)
    TextModel(weights).logits(token_ids[:1], cache)
    assert sorted(cache.stored) == [spec.index for spec in weights.config.layers if spec.is_kv_source]


@pytest.mark.parametrize("start", [0, 8, 10])
def test_a_start_that_is_not_the_caches_is_named(weights, token_ids, start):
    """The cache has 9 tokens."""
    model, cache = TextModel(weights), PlainCache(weights.config, windowed=False)
    model.logits(token_ids[:1, :9], cache)
    with pytest.raises(TokenError, match="is `start` the number of tokens it has"):
        model.logits(token_ids[:1, 9:10], cache, start)


def test_a_batch_with_a_cache_is_its_sequences_with_one_each(weights, token_ids):
    model = TextModel(weights)
    cache, alone = PlainCache(weights.config, windowed=True), []
    together = [model.logits(token_ids[:, :9], cache), model.logits(token_ids[:, 9:], cache, 9)]
    for one in token_ids.split(1):
        cache = PlainCache(weights.config, windowed=True)
        alone.append(torch.cat([model.logits(one[:, :9], cache), model.logits(one[:, 9:], cache, 9)], dim=1))
    assert relative_l2(torch.cat(together, dim=1), torch.cat(alone)) <= 1e-5


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, 120]]), "token id 120 is out of range; expected 0 to 119"),
        (torch.tensor([[-1, 5]]), "token id -1 is out of range; expected 0 to 119"),
        (torch.tensor([[1.0, 2.0]]), "token ids are torch.float32; expected integers"),
        (torch.tensor([[True]]), "token ids are torch.bool; expected integers"),
        (torch.tensor([1, 2]), r"of shape \[2\]; expected \[batch, tokens\]"),
        (torch.zeros(1, 0, dtype=torch.long), r"of shape \[1, 0\]; expected"),
    ],
)
def test_bad_token_ids_are_named(weights, ids, message):
    """The id and the limit, the dtype, or the shape."""
    with pytest.raises(TokenError, match=message):
        TextModel(weights).logits(ids)


def test_weights_are_read_in_order_and_once(weights, token_ids):
    """A layer's weights are asked for once, in order, and of the tables only rows, but for the head."""
    asked = []
    watched = SimpleNamespace(
        config=weights.config,
        layer=lambda index: asked.append(index) or weights.layer(index),
        get=lambda name: asked.append(name) or weights.get(name),
        rows=lambda name, ids: asked.append(name) or weights.rows(name, ids),
    )
    states = TextModel(watched).hidden_states(token_ids)
    next(states)
    assert not any(isinstance(name, int) for name in asked)
    for _ in states:
        pass
    assert [name for name in asked if isinstance(name, int)] == list(range(12))
    assert asked.count("embed_tokens.weight") == asked.count("embed_tokens_per_layer.weight") == 1


class QuantizedWeights:
    """Every matrix quantized, or decoded again."""

    def __init__(self, weights: CheckpointWeights, decoded: bool) -> None:
        self._weights, self._decoded, self.config = weights, decoded, weights.config

    def _changed(self, weight):
        if weight.dim() != 2:
            return weight
        quantized = quantize(weight, WeightSpec("int8"))
        return quantized.dequantize(torch.float32) if self._decoded else quantized

    def layer(self, index):
        return {name: self._changed(weight) for name, weight in self._weights.layer(index).items()}

    def get(self, name):
        return self._changed(self._weights.get(name))

    def rows(self, name, ids):
        rows = self._changed(self._weights.rows(name, ids))
        return rows if self._decoded else rows.dequantize(torch.float32)


def test_quantized_weights_compute_as_their_decoded_values(weights, token_ids):
    """Every matrix of the model may be quantized, the tied embedding included."""
    quantized, decoded = (TextModel(QuantizedWeights(weights, how)).logits(token_ids) for how in (False, True))
    assert relative_l2(quantized, decoded) <= 1e-5
    assert relative_l2(quantized, TextModel(weights).logits(token_ids)) > 1e-4


def test_configs_of_other_sizes_than_the_file_do_not_open(toy, tmp_path):
    """The shapes are checked before anything is computed."""
    text = json.loads((toy("e4b") / "config.json").read_text(encoding="utf-8")) | {"hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(text), encoding="utf-8")
    with (
        Checkpoint.open(toy("e4b"), config=tmp_path / "config.json") as checkpoint,
        pytest.raises(ConfigError, match="but the config makes it"),
    ):
        CheckpointWeights(checkpoint)
