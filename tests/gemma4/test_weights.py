import pytest
import torch
from safetensors.torch import load_file

from epic_quant.checkpoint import Checkpoint
from epic_quant.gemma4.weights import CheckpointWeights


@pytest.mark.parametrize("name", ["e4b", "no_ple"])
def test_layers_and_globals_are_the_stored_tensors(toy, name):
    """Every tensor of the file is handed out, bit for bit, by its name in its layer or its canonical name."""
    stored = {key.removeprefix("model."): weight for key, weight in load_file(toy(name) / "model.safetensors").items()}
    with Checkpoint.open(toy(name)) as checkpoint:
        weights = CheckpointWeights(checkpoint)
        handed_out = {tensor: weights.get(tensor) for tensor in weights.tensors if not tensor.startswith("layers.")}
        for spec in weights.config.layers:
            handed_out |= {f"layers.{spec.index}.{local}": w for local, w in weights.layer(spec.index).items()}
        assert handed_out.keys() == stored.keys()
        assert all(torch.equal(handed_out[key], stored[key]) for key in stored)


def test_sharing_layers_have_no_kv_weights(toy):
    """Unused tensors are not handed out; all others are."""
    with Checkpoint.open(toy("e4b")) as checkpoint:
        weights = CheckpointWeights(checkpoint)
        kv_source, sharing = set(weights.layer(5)), set(weights.layer(11))
    assert kv_source - sharing == {f"self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")}
    assert not sharing - kv_source


def test_rows_of_a_table_are_bit_exact(toy):
    """Repeated and unsorted ids included."""
    table = load_file(toy("e4b") / "model.safetensors")["model.embed_tokens_per_layer.weight"]
    ids = torch.tensor([7, 0, 119, 7])
    with Checkpoint.open(toy("e4b")) as checkpoint:
        assert torch.equal(CheckpointWeights(checkpoint).rows("embed_tokens_per_layer.weight", ids), table[ids])
