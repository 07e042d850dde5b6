import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.checkpoint import Checkpoint
from epic_quant.gemma4.block import num_scores, plain_linear, query_blocks, rms_norm
from epic_quant.gemma4.model import begin
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.metrics import relative_l2

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "fp64"])
@pytest.mark.parametrize("ids", ["token_ids", "long_token_ids"])
@pytest.mark.parametrize("name", ["e4b", "e2b", "no_ple", "other_rope"])
def test_each_layer_is_that_of_transformers(toy, reference, request, name, ids, dtype):
    """Every layer alone, fed with their hidden state: sliding and full, KV sources and sharing layers."""
    token_ids = request.getfixturevalue(ids)
    model = reference(name, dtype)
    outputs = {}
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, i=i: outputs.update({i: (inputs[0], output)}))
        for i, layer in enumerate(model.model.layers)
    ]
    with_states = model(token_ids, output_hidden_states=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    with Checkpoint.open(toy(name)) as checkpoint:
        weights = CheckpointWeights(checkpoint)
        _, forward = begin(weights, token_ids, dtype)
        for spec in weights.config.layers:
            fed, expected = with_states.hidden_states[spec.index], outputs[spec.index][1]
            ours = forward.layer(fed, weights.layer(spec.index), spec)
            assert ours.dtype == dtype
            assert relative_l2(ours, expected) <= LIMITS[dtype], spec


@given(
    window=st.none() | st.integers(1, 700),
    tokens=st.integers(1, 900),
    before=st.integers(0, 300),
    queries=st.integers(),
)
def test_a_query_attends_with_every_key_that_it_sees(window, tokens, before, queries):
    """By the definition: its own key, and of those before it as many as the window holds."""
    query = queries % tokens
    blocks = list(query_blocks(window, tokens, before + tokens))
    assert [one for queries, _ in blocks for one in range(tokens)[queries]] == list(range(tokens))
    (keys,) = [keys for queries, keys in blocks if query in range(tokens)[queries]]
    own = before + query
    oldest = 0 if window is None else max(0, own + 1 - window)
    assert 0 <= keys.start <= oldest <= own < keys.stop <= before + tokens


def test_few_scores_are_computed_that_a_window_blocks():
    """At E4B's window of 512 tokens; on full layers little more than the half that causality leaves."""
    sliding, full = 512, None
    assert num_scores(sliding, 2048) <= 2048 * (512 + 128)
    assert num_scores(full, 2048) == 2048 * (2048 + 128) // 2
    assert num_scores(full, 17) == num_scores(sliding, 17) == 17 * 17


def test_a_block_leaves_its_input_as_it_was(toy, token_ids):
    """A caller may send one hidden state through several policies' layers."""
    with Checkpoint.open(toy("e4b")) as checkpoint:
        weights = CheckpointWeights(checkpoint)
        hidden, forward = begin(weights, token_ids)
        before = hidden.clone()
        spec = weights.config.layers[0]
        first = forward.layer(hidden, weights.layer(0), spec)
        assert torch.equal(hidden, before)
        assert torch.equal(forward.layer(hidden, weights.layer(0), spec), first)


@pytest.mark.parametrize("layer", [0, 5, 11])
def test_a_given_linear_sees_the_input_of_every_matrix(toy, token_ids, layer):
    """By the weight's name, once each, with as many columns as the weight has."""
    seen = {}

    def watching(x, weight, name):
        assert name not in seen
        seen[name] = x.shape
        return plain_linear(x, weight, name)

    with Checkpoint.open(toy("e4b")) as checkpoint:
        weights = CheckpointWeights(checkpoint)
        hidden, forward = begin(weights, token_ids)
        for spec in weights.config.layers[: layer + 1]:
            watched = watching if spec.index == layer else plain_linear
            hidden = forward.layer(hidden, weights.layer(spec.index), spec, watched)
        matrices = {name: weight.shape for name, weight in weights.layer(layer).items() if weight.dim() == 2}
    assert seen == {name: (2, 17, cols) for name, (_, cols) in matrices.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_follows_the_formula(dtype):
    """It is x / sqrt(mean(x^2) + eps) times the weight itself, in fp32, in the dtype of x."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 32, generator=generator).to(dtype)
    weight = torch.rand(32, generator=generator).bfloat16()
    wide = x.float().double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    normed = rms_norm(x, weight, 1e-6)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed.double(), expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)


def test_weights_of_a_finer_dtype_are_rounded_to_that_of_the_model():
    """As loading them in that dtype would: an fp32 norm in a bf16 model is a bf16 norm."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 32, generator=generator).bfloat16(), torch.rand(32, generator=generator)
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x, weight.bfloat16(), 1e-6))
