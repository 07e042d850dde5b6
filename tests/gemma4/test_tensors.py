import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, ConfigError
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import expected_tensors, text_tensors
from epic_quant.spec import TensorClass


@pytest.fixture
def e4b(facts):
    """E4B's config and its file's header, in the place of a checkpoint of 16 GB."""
    shapes = facts("gemma-4-E4B.tensors.json")["shapes"]
    header = SimpleNamespace(
        source="E4B",
        names=tuple(shapes),
        shape=lambda name: tuple(shapes[name]),
        dtype=lambda name: torch.bfloat16,
    )
    return TextConfig.from_json(facts("gemma-4-E4B.config.json")), header, shapes


def test_every_tensor_of_e4b_is_text_or_of_a_tower(e4b):
    """The two add up to the file's 2130 tensors."""
    config, header, shapes = e4b
    found = text_tensors(header, config)
    others = set(shapes) - set(found.values())
    towers = [name.split(".")[1] for name in others]
    assert len(shapes) == 2130
    assert len(found) == len(set(found.values())) == 42 * 17 + 5
    assert (towers.count("vision_tower"), towers.count("audio_tower")) == (658, 751)
    assert {name for name in others if "tower" not in name} == {
        "model.embed_audio.embedding_projection.weight",
        "model.embed_vision.embedding_projection.weight",
    }


def test_every_matrix_of_e4b_is_in_one_class_and_nothing_else_is(e4b):
    """Shapes come from the file, classes from the name."""
    config, header, shapes = e4b
    found = text_tensors(header, config)
    for tensor in expected_tensors(config):
        shape = shapes[found[tensor.name]]
        assert tensor.shape == tuple(shape), tensor.name
        assert (tensor.tensor_class is not None) == (len(shape) == 2), tensor.name


def test_classes_of_e4b_hold_what_their_names_say(e4b):
    """How many tensors are in each class; attention by the type of the layer, PLE projections two a layer."""
    classes = [tensor.tensor_class for tensor in expected_tensors(e4b[0])]
    assert {tensor_class: classes.count(tensor_class) for tensor_class in TensorClass} == {
        "sliding_attention": 35 * 4,
        "full_attention": 7 * 4,
        "mlp": 42 * 3,
        "ple_projections": 42 * 2,
        "ple_model_projection": 1,
        "ple_table": 1,
        "embedding": 1,
    }
    assert [str(tensor_class) for tensor_class in TensorClass] == [
        "sliding_attention",
        "full_attention",
        "mlp",
        "ple_projections",
        "ple_model_projection",
        "ple_table",
        "embedding",
    ]


def test_unused_tensors_of_e4b(e4b):
    """K and V weights of the 18 sharing layers: 54 tensors, counted here from the file's shapes."""
    config, header, shapes = e4b
    found = text_tensors(header, config)
    unused = [tensor for tensor in expected_tensors(config) if tensor.unused]
    assert len(unused) == 54
    assert sum(2 * math.prod(shapes[found[tensor.name]]) for tensor in unused) == 110_111_232
    assert {tensor.layer for tensor in unused} == set(range(24, 42))
    assert {tensor.local_name for tensor in unused} == {
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.k_norm.weight",
    }


@pytest.mark.parametrize("name", ["e4b", "e2b", "no_ple", "no_sharing"])
def test_expected_tensors_are_what_transformers_saves(toy, name):
    """The used ones, by name and shape; `transformers` leaves out the unused ones."""
    with Checkpoint.open(toy(name)) as checkpoint:
        expected = expected_tensors(TextConfig.read(checkpoint))
        used = {tensor.name: tensor.shape for tensor in expected if not tensor.unused}
        assert used == {file.removeprefix("model."): checkpoint.shape(file) for file in checkpoint.names}


@pytest.fixture
def resaved(toy, tmp_path):
    """Opens the `e4b` toy again with its tensors changed."""

    def resave(change):
        weights = change(load_file(toy("e4b") / "model.safetensors"))
        save_file(weights, tmp_path / "model.safetensors")
        return Checkpoint.open(tmp_path, config=toy("e4b") / "config.json")

    return resave


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "language_model.",
        "model.language_model.",
        "language_model.model.",
        "base_model.model.model.",
        "module.model.",
        "_orig_mod.model.",
        "module._orig_mod.model.language_model.",
    ],
)
def test_prefixes_do_not_matter(resaved, prefix):
    """Names of the multimodal class, of the text-only class, and bare ones; towers beside them are not text."""

    def rename(weights):
        towers = {
            f"{prefix}vision_tower.layers.0.weight": torch.zeros(2),
            "model.audio_tower.norm.weight": torch.ones(1),
        }
        return {prefix + name.removeprefix("model."): weight for name, weight in weights.items()} | towers

    with resaved(rename) as checkpoint:
        config = TextConfig.read(checkpoint)
        found = text_tensors(checkpoint, config)
        assert set(found) == {tensor.name for tensor in expected_tensors(config) if not tensor.unused}
        assert all(file == prefix + name for name, file in found.items())


def test_unused_tensors_may_be_in_the_file(resaved):
    """They are found, so that their bytes can be counted."""
    unused = torch.zeros(2 * 16, 48)
    with resaved(lambda weights: weights | {"model.layers.7.self_attn.k_proj.weight": unused}) as checkpoint:
        assert "layers.7.self_attn.k_proj.weight" in text_tensors(checkpoint, TextConfig.read(checkpoint))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda w: {k: v for k, v in w.items() if "layers.3.mlp.up" not in k},
            CheckpointError,
            "no tensor layers.3.mlp",
        ),
        (
            lambda w: w | {"model.layers.2.mlp.up_proj.weight": torch.zeros(80, 47)},
            ConfigError,
            r"model.layers.2.mlp.up_proj.weight is \[80, 47\], but the config makes it \[80, 48\]",
        ),
        (
            lambda w: w | {"model.layers.7.self_attn.v_proj.weight": torch.zeros(1, 48)},
            ConfigError,
            r"self_attn.v_proj.weight is \[1, 48\], but the config makes it \[32, 48\]",
        ),
        (
            lambda w: w | {"model.layers.12.layer_scalar": torch.ones(1)},
            ConfigError,
            "has no tensor layers.12.layer_scalar",
        ),
        (
            lambda w: w | {"model.language_model.norm.weight": torch.ones(48)},
            CheckpointError,
            "model.language_model.norm.weight and model.norm.weight are the same tensor",
        ),
        (
            lambda w: w | {"lm_head.weight": torch.zeros_like(w["model.embed_tokens.weight"])},
            CheckpointError,
            "lm_head.weight differs from model.embed_tokens.weight",
        ),
        (
            lambda w: {name.replace("layers", "blocks"): weight for name, weight in w.items()},
            CheckpointError,
            "no tensor layers.0.input_layernorm.weight; the nearest that it has is model.blocks.0.inp",
        ),
        (
            lambda w: w | {"model.layers.2.mlp.up_proj.weight": torch.zeros(80, 48, dtype=torch.int8)},
            CheckpointError,
            "model.layers.2.mlp.up_proj.weight is stored as int8; expected plain weights",
        ),
        (
            lambda w: w | {"model.layers.2.mlp.up_proj.weight_scale": torch.ones(80)},
            CheckpointError,
            "has model.layers.2.mlp.up_proj.weight_scale; expected plain weights",
        ),
        (
            lambda w: w | {"score.weight": torch.ones(2, 48)},
            CheckpointError,
            "score.weight is no tensor of Gemma 4's text model or of its towers",
        ),
    ],
    ids=[
        "missing",
        "other shape",
        "unused of other shape",
        "too many layers",
        "twice",
        "another head",
        "another layout",
        "codes",
        "scales",
        "a head for another task",
    ],
)
def test_a_file_that_disagrees_with_its_config_is_named(resaved, change, error, message):
    """The tensor, and both shapes."""
    with resaved(change) as checkpoint, pytest.raises(error, match=message) as caught:
        text_tensors(checkpoint, TextConfig.read(checkpoint))
    assert "\n" not in str(caught.value)
