"""Folders: `transformers` loads them and computes the logits that the policy has here."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
)

from epic_quant.checkpoint import Checkpoint
from epic_quant.export.__main__ import main
from epic_quant.export.folder import module_patterns
from epic_quant.gemma4.model import TextModel
from epic_quant.gemma4.tensors import expected_tensors
from epic_quant.policy import PolicyWeights
from epic_quant.spec import PolicySpec

from .conftest import MINI

POLICIES = {
    "compressed-tensors": (
        "sliding_attention=int4-g64,sliding_attention.q_proj=int8,sliding_attention@3=bf16,full_attention=int8-g128,"
        "mlp=int4-g128,mlp.down_proj@0-4=int8-g32,ple_projections.per_layer_input_gate=int8,ple_model_projection=int4"
    ),
    "gemma": (
        "sliding_attention=int4,sliding_attention.q_proj=int8,sliding_attention@3=bf16,full_attention=int8,mlp=int2,"
        "mlp.down_proj=int8,ple_projections.per_layer_input_gate=int8,ple_model_projection=int4,ple_table=int4"
    ),
}
IDS = torch.tensor([[2, *range(300, 363)]])


@pytest.mark.parametrize("file_format", POLICIES)
def test_transformers_computes_the_same_logits(file_format, export, mini):
    if file_format == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    folder = export(file_format, POLICIES[file_format])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ours = TextModel(PolicyWeights(mini, PolicySpec.parse(POLICIES[file_format]))).logits(IDS)
    with torch.inference_mode():
        theirs = model(IDS).logits
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()
    plain = TextModel(PolicyWeights(mini, PolicySpec.parse("bf16"))).logits(IDS)
    assert (theirs - plain).abs().max() > 0.1  # what is compared is quantized
    assert AutoTokenizer.from_pretrained(folder)("import os").input_ids[0] == 2


@pytest.mark.parametrize(("name", "bits", "group"), [("self_attn.k_proj", 4, 64), ("mlp.down_proj", 8, 32)])
def test_compressed_tensors_are_read_by_their_published_formula(name, bits, group, export, mini):
    policy = POLICIES["compressed-tensors"]
    with safe_open(export("compressed-tensors", policy) / "model.safetensors", "np") as file:
        packed, scale, shape = (
            file.get_tensor(f"model.layers.0.{name}.weight_{part}") for part in ("packed", "scale", "shape")
        )
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (packed.view(np.uint32)[:, :, None] >> shifts & (1 << bits) - 1).reshape(shape)
    values = (codes.astype(np.float32) - (1 << bits - 1)) * scale.astype(np.float32).repeat(group, axis=1)
    ours = PolicyWeights(mini, PolicySpec.parse(policy)).get(f"layers.0.{name}.weight").dequantize()
    np.testing.assert_array_equal(values, ours.numpy())


def test_a_folder_has_all_that_is_used_and_its_companions(export, mini):
    folder = export("gemma", "mlp=int8")
    with safe_open(folder / "model.safetensors", "pt") as file:
        plain = [name for name in mini.names if ".mlp." not in name]
        assert set(plain) <= set(file.keys())
        assert all(torch.equal(file.get_tensor(name), mini.tensor(name)) for name in plain)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (MINI / name).read_bytes()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config.pop("quantization_config")["quant_method"] == "gemma"
    assert config == mini.config_json


@pytest.fixture(scope="session")
def multimodal(tmp_path_factory):
    """A folder of a small random model of the multimodal class, with both towers."""
    torch.manual_seed(0)
    text = Gemma4TextConfig(
        vocab_size=120, vocab_size_per_layer_input=120, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_kv_shared_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, global_head_dim=64,
        layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=32, sliding_window=6,
    )  # fmt: skip
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tower | {"intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16}
    audio = tower | {"output_proj_dims": 32, "subsampling_conv_channels": [8, 4]}
    markers = ("image_token_id", "audio_token_id", "video_token_id", "boi_token_id", "eoi_token_id", "boa_token_id")
    ids = {name: 100 + index for index, name in enumerate(markers)} | {"eoa_token_id": 110, "eoa_token_index": 110}
    vision["position_embedding_size"] = 16
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=audio, **ids)
    model = Gemma4ForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.state_dict().values():
            if weight.is_floating_point() and weight.dim() == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
    folder = tmp_path_factory.mktemp("multimodal")
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("file_format", POLICIES)
def test_a_multimodal_model_keeps_its_towers(file_format, multimodal, tmp_path):
    policy = "sliding_attention=int4,full_attention=int8,mlp=int8,ple_projections=int8"
    if file_format == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    assert main([str(multimodal), "--policy", policy, "--format", file_format, str(tmp_path / "out")]) == 0
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.arange(20)[None] + 3
    with torch.inference_mode():
        theirs = model(ids).logits
    with Checkpoint.open(multimodal) as checkpoint:
        ours = TextModel(PolicyWeights(checkpoint, PolicySpec.parse(policy))).logits(ids)
        towers = [name for name in checkpoint.names if "language_model" not in name]
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
            assert towers
            assert all(torch.equal(file.get_tensor(name), checkpoint.tensor(name)) for name in towers)
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()


def test_patterns_match_the_modules_of_their_tensors_in_e4bs_file_and_no_others(e4b):
    facts = json.loads((MINI.parent / "facts" / "gemma-4-E4B.tensors.json").read_text(encoding="utf-8"))
    tensors = [tensor for tensor in expected_tensors(e4b) if tensor.target is not None]
    names = {f"model.language_model.{tensor.name}".removesuffix(".weight"): tensor.target.kind for tensor in tensors}
    modules = [name.removesuffix(".weight") for name in facts["shapes"]]
    assert names.keys() <= set(modules)
    patterns = module_patterns(tensors)
    found = {name: sum(re.search(pattern, name) is not None for pattern in patterns) for name in modules}
    assert found == {name: int(name in names) for name in modules}
    # vLLM has another prefix.
    assert any(re.match(pattern, "language_model.model.layers.3.mlp.up_proj") for pattern in patterns)
