"""What attention works with is captured as the model has it, and a policy's errors are those that NumPy finds."""

import numpy as np
import pytest
import torch

from epic_quant.checkpoint import Checkpoint
from epic_quant.gemma4.block import plain_linear
from epic_quant.gemma4.config import FULL, SLIDING
from epic_quant.gemma4.model import TextModel, begin, head
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.kv import KVCache
from epic_quant.kv.attention_error import AttentionError, capture
from epic_quant.spec import KVSpec

TOKENS = 23  # no multiple of the toy's window of 6


@pytest.fixture(scope="module")
def weights(toy):
    with Checkpoint.open(toy("e4b")) as checkpoint:
        yield CheckpointWeights(checkpoint)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(4, 120, (TOKENS,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def captured(weights, ids):
    return capture(weights, ids)


def softmax(logits):
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def attended(captured, spec, k, v, end):
    """Every query head's logits and output at the newest of `end` tokens, head by head in fp64."""
    heads = []
    group = spec.attention.num_heads // spec.attention.num_kv_heads
    for number in range(spec.attention.num_heads):
        query = captured.queries[spec.index][number, end - 1].double().numpy()
        logits = k[number // group] @ query
        heads.append((logits, softmax(logits) @ v[number // group]))
    return heads


def test_the_hidden_state_is_that_of_a_forward_without_a_cache(captured, weights, ids):
    assert torch.equal(head(weights, captured.hidden), TextModel(weights).logits(ids[None]))


def test_what_is_captured_gives_the_attention_that_the_model_computes(captured, weights, ids):
    """On every layer, sliding and sharing ones included: what goes into o_proj at the last token."""
    mixed = {}
    hidden, forward = begin(weights, ids[None])
    for spec in weights.config.layers:

        def observe(x, weight, name, index=spec.index):
            if name == "self_attn.o_proj.weight":
                mixed[index] = x[0, -1]
            return plain_linear(x, weight)

        hidden = forward.layer(hidden, weights.layer(spec.index), spec, observe)
    for spec in weights.config.layers:
        seen = slice(TOKENS - spec.attention.sliding_window if spec.attention.sliding_window else 0, TOKENS)
        k, v = (kept[spec.kv_source][:, seen].double().numpy() for kept in (captured.keys, captured.values))
        outputs = np.concatenate([output for _, output in attended(captured, spec, k, v, TOKENS)])
        np.testing.assert_allclose(outputs, mixed[spec.index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer_type", [SLIDING, FULL])
def test_a_cache_in_fp32_has_no_error(captured, layer_type):
    error = AttentionError([captured], layer_type, step=5).of(KVSpec.parse("fp32"))
    assert max(vars(error).values()) < 1e-6


@pytest.mark.parametrize("layer_type", [SLIDING, FULL])
@pytest.mark.parametrize("policy", ["int4", "k=int4-b8/v=int3/residual=2"])
def test_errors_are_those_that_numpy_finds(captured, layer_type, policy):
    """From a cache filled by single appends; layers, heads, checkpoints and both texts pooled."""
    step, policy = 5, KVSpec.parse(policy)
    sums = {name: np.zeros(2) for name in ("k", "v", "logit", "attention")}

    def add(name, actual, exact, count=None):
        sums[name] += np.square(actual - exact).sum(), np.square(exact).sum() if count is None else count

    cache, config = KVCache(captured.config, policy), captured.config
    for kv_source in (s for s in config.layers if s.is_kv_source and s.layer_type == layer_type):
        keys, values = captured.keys[kv_source.index], captured.values[kv_source.index]
        for end in range(1, TOKENS + 1):
            cache.append(kv_source.index, keys[None, :, end - 1 : end], values[None, :, end - 1 : end])
            if end % step:
                continue
            kept = min(end, kv_source.attention.sliding_window or end)
            exact = [x[:, end - kept : end].double().numpy() for x in (keys, values)]
            stored = [
                x[0, :, -kept:].double().numpy() for x in (cache.keys(kv_source.index), cache.values(kv_source.index))
            ]
            add("k", stored[0], exact[0])
            add("v", stored[1], exact[1])
            for spec in (s for s in config.layers if s.kv_source == kv_source.index):
                pairs = zip(attended(captured, spec, *stored, end), attended(captured, spec, *exact, end), strict=True)
                for (logits, output), (exact_logits, exact_output) in pairs:
                    add("logit", logits, exact_logits, len(logits))
                    add("attention", output, exact_output)
    expected = {name: np.sqrt(error / norm) for name, (error, norm) in sums.items()}
    error = AttentionError([captured, captured], layer_type, step).of(policy)
    assert error.k_rel_l2 == pytest.approx(expected["k"], rel=1e-4)
    assert error.v_rel_l2 == pytest.approx(expected["v"], rel=1e-4)
    assert error.logit_rms == pytest.approx(expected["logit"], rel=1e-4)
    assert error.attention_rel_l2 == pytest.approx(expected["attention"], rel=1e-4)
    assert min(vars(error).values()) > 1e-3


def test_a_text_shorter_than_a_step_has_one_checkpoint(captured):
    whole, longer = (AttentionError([captured], FULL, step) for step in (TOKENS, 1000))
    policy = KVSpec.parse("int3")
    assert whole.of(policy) == longer.of(policy)
