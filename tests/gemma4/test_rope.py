import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

from epic_quant.gemma4.config import GroupedQueryAttention, Rope, TextConfig
from epic_quant.gemma4.rope import inverse_frequencies, rope_table, rotate, rotated_dims

E4B = "gemma-4-E4B.config.json"
SLIDING, FULL = 0, 5


@pytest.mark.parametrize("name", [E4B, "gemma-4-E2B.config.json"])
def test_tables_are_those_of_transformers(facts, name):
    """Frequencies, cosines and sines bit for bit, up to the last position of the context."""
    text = facts(name)["text_config"]
    theirs = Gemma4TextRotaryEmbedding(Gemma4TextConfig(**text))
    positions = torch.tensor([0, 1, 2, 511, 4096, 131071])
    for spec in TextConfig.from_json(text).layers:
        assert torch.equal(inverse_frequencies(spec.attention), getattr(theirs, f"{spec.layer_type}_inv_freq"))
        for dtype in (torch.float32, torch.bfloat16):
            cos, sin = theirs(torch.empty(0, dtype=dtype), positions[None], spec.layer_type)
            table = rope_table(spec.attention, positions, dtype)
            assert table.cos.dtype == dtype
            assert torch.equal(table.cos, cos[0])
            assert torch.equal(table.sin, sin[0])


def test_frequencies_of_e4b_follow_the_formula(facts):
    """theta^(-2i/head_dim); the exponent's denominator is the head's 512, not the 128 rotated dims; fp32."""
    layers = TextConfig.from_json(facts(E4B)).layers
    sliding, full = inverse_frequencies(layers[SLIDING].attention), inverse_frequencies(layers[FULL].attention)
    assert full.dtype == sliding.dtype == torch.float32
    expected = torch.tensor([1e6 ** (-2 * i / 512) if i < 64 else 0.0 for i in range(256)], dtype=torch.float64)
    torch.testing.assert_close(full.double(), expected, rtol=1e-6, atol=0)
    expected = torch.tensor([1e4 ** (-2 * i / 256) for i in range(128)], dtype=torch.float64)
    torch.testing.assert_close(sliding.double(), expected, rtol=1e-6, atol=0)


def test_rotated_dims_of_e4b(facts):
    """64 pairs of a full head rotate, paired half a head apart; all dims of a sliding head rotate."""
    layers = TextConfig.from_json(facts(E4B)).layers
    assert rotated_dims(layers[FULL].attention).tolist() == [*range(64), *range(256, 320)]
    assert rotated_dims(layers[SLIDING].attention).tolist() == list(range(256))


@pytest.mark.parametrize("layer", [SLIDING, FULL])
def test_rotated_dims_are_those_that_change_with_position(facts, layer):
    """The same vector at two positions differs in these dims and in no other."""
    spec = TextConfig.from_json(facts(E4B)).layers[layer]
    x = torch.rand(2, 1, spec.attention.head_dim, generator=torch.Generator().manual_seed(0)).expand(2, 2, -1) + 1
    rotated = rotate(x, rope_table(spec.attention, torch.tensor([3, 90_000]), torch.float32))
    changed = (rotated[:, 0] != rotated[:, 1]).any(dim=0).nonzero().flatten()
    assert torch.equal(changed, rotated_dims(spec.attention))


@settings(max_examples=50)
@given(
    pairs=st.integers(0, 8), factor=st.sampled_from([1.0, 2.0]), position=st.integers(0, 1000), by=st.integers(0, 99)
)
def test_scores_depend_on_the_distance_alone(pairs, factor, position, by):
    """A rotated query times a rotated key is the same wherever the two stand, and rotating keeps lengths."""
    attention = GroupedQueryAttention(1, 1, 16, None, Rope(1e4, pairs, factor))
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(pairs))

    def at(x, where):
        return rotate(x, rope_table(attention, torch.tensor([where]), torch.float32))

    far, near = (at(q, position + by + shift) @ at(k, position + shift).T for shift in (0, 57))
    torch.testing.assert_close(far, near, rtol=0, atol=1e-3)
    torch.testing.assert_close(at(q, position).norm(), q.norm())
    assert len(rotated_dims(attention)) == 2 * pairs
