import copy
import json
import math
from typing import Any

import pytest
from transformers import Gemma4TextConfig

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import ConfigError
from epic_quant.gemma4.config import TextConfig

E4B, E2B = "gemma-4-E4B.config.json", "gemma-4-E2B.config.json"


def test_e4b_layers_are_as_published(facts):
    """The layer types, the KV source layers, and the source of every other layer."""
    layers = TextConfig.from_json(facts(E4B)).layers
    full = [spec for spec in layers if spec.layer_type == "full_attention"]
    kv_sources = [spec for spec in layers if spec.is_kv_source]
    assert [spec.index for spec in full] == [5, 11, 17, 23, 29, 35, 41]
    assert [spec.index for spec in kv_sources] == list(range(24))
    assert [spec.layer_type for spec in kv_sources].count("sliding_attention") == 20
    assert {(spec.layer_type, spec.kv_source) for spec in layers[24:]} == {
        ("sliding_attention", 22),
        ("full_attention", 23),
    }
    assert {
        (
            spec.attention.head_dim,
            spec.attention.sliding_window,
            spec.attention.rope.theta,
            spec.attention.rope.rotated_pairs,
        )
        for spec in full
    } == {(512, None, 1e6, 64)}
    assert (
        layers[0].attention.head_dim,
        layers[0].attention.sliding_window,
        layers[0].attention.rope.rotated_pairs,
    ) == (256, 512, 128)
    assert {(spec.attention.num_heads, spec.attention.num_kv_heads, spec.mlp.intermediate_size) for spec in layers} == {
        (8, 2, 10240)
    }


def test_e4b_sizes_are_as_published(facts):
    """The fields that are of the whole model."""
    config = TextConfig.from_json(facts(E4B))
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (262144, 2560, 42)
    assert (config.ple_vocab_size, config.ple_dim, config.bos_token_id) == (262144, 256, 2)
    assert (config.rms_norm_eps, config.final_logit_softcapping, config.max_position_embeddings) == (1e-6, 30.0, 131072)


def test_e2b_shares_more_and_is_double_wide_where_it_shares(facts):
    """35 layers of 4:1, 20 of them sharing and with twice the MLP."""
    layers = TextConfig.from_json(facts(E2B)).layers
    assert [spec.index for spec in layers if spec.layer_type == "full_attention"] == [4, 9, 14, 19, 24, 29, 34]
    assert [spec.is_kv_source for spec in layers] == [True] * 15 + [False] * 20
    assert {spec.kv_source for spec in layers[15:]} == {13, 14}
    assert [spec.mlp.intermediate_size for spec in layers] == [6144] * 15 + [12288] * 20
    assert {spec.attention.num_kv_heads for spec in layers} == {1}


@pytest.mark.parametrize("name", [E4B, E2B])
def test_sharing_agrees_with_transformers(facts, name):
    """Sources are the layers that `transformers` marks as storing for others."""
    text = facts(name)["text_config"]
    modes = Gemma4TextConfig(**text).kv_sharing_modes
    layers = TextConfig.from_json(text).layers
    assert [spec.is_kv_source for spec in layers] == [mode != "reuse" for mode in modes]
    assert {spec.kv_source for spec in layers if not spec.is_kv_source} == {
        i for i, m in enumerate(modes) if m == "store"
    }


@pytest.mark.parametrize("name", [E4B, E2B])
@pytest.mark.parametrize("nested", [True, False])
def test_every_form_of_a_config_reads_the_same(facts, name, nested):
    """The published form, and what current `transformers` writes of it, nested or at the top level."""
    published = facts(name)
    current = json.loads(Gemma4TextConfig(**copy.deepcopy(published["text_config"])).to_json_string(use_diff=False))
    assert "per_layer_config" in current
    assert "global_head_dim" not in current
    form = {"model_type": "gemma4", "text_config": current} if nested else current
    assert TextConfig.from_json(form) == TextConfig.from_json(published)


@pytest.mark.parametrize("key", ["{:02d}", "{:d}", "{:03d}"])
def test_layer_keys_may_be_padded(facts, key):
    """`per_layer_config` is keyed by what reads as an integer."""
    text = facts(E4B)["text_config"]
    expected = TextConfig.from_json(text)
    del text["global_head_dim"]
    text["per_layer_config"] = {key.format(i): {"head_dim": 512} for i in range(5, 42, 6)}
    assert TextConfig.from_json(text) == expected


def test_an_empty_per_layer_config_means_no_override(facts):
    """It is what `transformers` writes where all heads are alike."""
    text = facts(E4B)["text_config"] | {"per_layer_config": {}, "global_head_dim": None}
    assert {spec.attention.head_dim for spec in TextConfig.from_json(text).layers} == {256}


def test_optional_fields_may_be_absent_or_null(facts):
    """Without a soft cap, without PLE, and without the flags of other Gemma 4 models."""
    text = facts(E4B)["text_config"]
    for name in [
        "final_logit_softcapping",
        "attention_k_eq_v",
        "enable_moe_block",
        "attention_bias",
        "use_double_wide_mlp",
        "use_bidirectional_attention",
        "tie_word_embeddings",
        "vocab_size_per_layer_input",
    ]:
        del text[name]
    config = TextConfig.from_json(text | {"hidden_size_per_layer_input": 0})
    assert (config.final_logit_softcapping, config.ple_dim, config.ple_vocab_size) == (None, 0, 0)


WITH_DEFAULTS = [
    "vocab_size",
    "hidden_size",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
    "rms_norm_eps",
    "max_position_embeddings",
    "bos_token_id",
    "layer_types",
    "num_kv_shared_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "global_head_dim",
    "intermediate_size",
    "sliding_window",
    "rope_parameters",
    "hidden_activation",
    "final_logit_softcapping",
    "use_double_wide_mlp",
]


@pytest.mark.parametrize("form", [E4B, E2B])
@pytest.mark.parametrize("name", WITH_DEFAULTS)
def test_an_absent_field_is_what_transformers_makes_of_it(facts, form, name):
    """Every field that has a default there, derived ones too."""
    text = facts(form)["text_config"]
    text.pop(name, None)
    if name == "layer_types":
        text["num_kv_shared_layers"] = 0
    assert TextConfig.from_json(text) == TextConfig.from_json(Gemma4TextConfig(**text).to_dict())


def test_a_config_of_nothing_is_transformers_default():
    assert TextConfig.from_json({"model_type": "gemma4_text"}) == TextConfig.from_json(Gemma4TextConfig().to_dict())


def test_layers_without_types_end_with_a_full_one(facts):
    text = facts(E4B)["text_config"] | {"layer_types": None, "num_hidden_layers": 16, "num_kv_shared_layers": 0}
    assert TextConfig.from_json(text) == TextConfig.from_json(Gemma4TextConfig(**text).to_dict())


@pytest.mark.parametrize(
    "name",
    sorted(
        {*WITH_DEFAULTS}
        - {"layer_types", "rope_parameters", "final_logit_softcapping", "global_head_dim", "use_double_wide_mlp"}
    ),
)
def test_a_field_that_is_null_is_named(facts, name):
    """`transformers` refuses it too."""
    config = facts(E4B)
    config["text_config"][name] = None
    with pytest.raises(ConfigError, match=rf"lacks {name}$|{name} is None"):
        TextConfig.from_json(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_hidden_layers", value) for value in (10**9, 10**400, 0, -1, 1.5, True, "42", math.inf, math.nan, [42])),
        *(("rms_norm_eps", value) for value in (10**400, 0, -1, True, "1e-6", math.inf, math.nan, [1e-6])),
    ],
)
def test_wild_numbers_are_named(facts, name, value):
    """Without as much memory as they ask for."""
    text = facts(E4B)["text_config"] | {"layer_types": None, name: value}
    with pytest.raises(ConfigError, match=rf"{name} is .*; expected a"):
        TextConfig.from_json(text)


def _rope(layer_type: str, **changes: Any) -> dict[str, Any]:
    both = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    }
    both[layer_type] |= changes
    return {"rope_parameters": both}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; expected 'gemma4' or 'gemma4_text'"),
        ({"model_type": None}, "model_type is None; expected"),
        ({"enable_moe_block": True}, "enable_moe_block is true"),
        ({"attention_k_eq_v": True}, "attention_k_eq_v is true"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'; expected 'gelu_pytorch_tanh'"),
        ({"layer_types": ["chunked_attention"] * 42}, r"layer_types\[0\] is 'chunked_attention'; expected"),
        ({"layer_types": ["full_attention"] * 41}, "names 41 layers, but num_hidden_layers is 42"),
        ({"layer_types": ["sliding_attention"] * 42}, "the last layer is 'sliding_attention'"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'; expected a list"),
        ({"num_kv_shared_layers": 38}, "layer 5 shares the K and V of a full_attention layer, but no such"),
        ({"num_kv_shared_layers": 42}, "layer 0 shares"),
        ({"num_kv_shared_layers": 50}, "layer 0 shares"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is no multiple of num_key_value_heads 3"),
        ({"use_double_wide_mlp": "false"}, "use_double_wide_mlp is 'false'; expected true or false"),
        ({"per_layer_config": {"9" * 5000: {"head_dim": 512}}}, "expected a layer from 0 to 41"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config says .* quantized .awq"),
        ({"hidden_size": "2560"}, "hidden_size is '2560'; expected an integer"),
        ({"vocab_size": 0}, "vocab_size is 0; expected an integer of at least 1"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06; expected a positive number"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping is 0; expected a positive number"),
        ({"head_dim": 255}, "head_dim of layer 0 is 255; RoPE needs an even one"),
        ({"per_layer_config": {"42": {"head_dim": 512}}}, "key '42'; expected a layer from 0 to 41"),
        ({"per_layer_config": {"x": {"head_dim": 512}}}, "key 'x'; expected a layer"),
        ({"per_layer_config": {"5": {"skip": ["mlp"]}}}, "per_layer_config.5 sets 'skip'"),
        ({"per_layer_config": {"5": 512}}, "per_layer_config.5 is 512; expected an object"),
        ({"per_layer_config": [512]}, "per_layer_config is .*; expected an object"),
        ({"per_layer_config": {"5": {"head_dim": 512}}}, "full_attention layers differ in .head_dim"),
        ({"rope_parameters": {}}, "lacks rope_parameters.sliding_attention"),
        (_rope("full_attention", rope_type="yarn"), "rope_type of full_attention is 'yarn'; expected"),
        (_rope("sliding_attention", rope_theta=None), "lacks rope_parameters.sliding_attention.rope_theta"),
        (_rope("full_attention", partial_rotary_factor=1.5), "partial_rotary_factor of full_attention is 1.5"),
    ],
)
def test_what_is_not_supported_is_one_clear_line(facts, changes, message):
    """Each names the field, what it is, and what was expected."""
    text = facts(E4B)["text_config"] | changes
    with pytest.raises(ConfigError, match=message) as error:
        TextConfig.from_json(text)
    assert "\n" not in str(error.value)


def test_an_untied_head_is_rejected_at_the_top_level_too(facts):
    """The multimodal class writes the flag in both places."""
    with pytest.raises(ConfigError, match="tie_word_embeddings is false"):
        TextConfig.from_json(facts(E4B) | {"tie_word_embeddings": False})


@pytest.mark.parametrize("change", [{"text_config": None}, {"text_config": {"model_type": "gemma3_text"}}])
def test_a_multimodal_config_needs_the_text_part(facts, change):
    """It must be there, and be Gemma 4's."""
    with pytest.raises(ConfigError, match=r"lacks text_config|'gemma3_text'; expected"):
        TextConfig.from_json(facts(E4B) | change)


def test_reading_a_checkpoint_names_it_in_errors(toy, tmp_path):
    """What `save_pretrained` wrote is read, and an error names the checkpoint."""
    with Checkpoint.open(toy("e2b")) as checkpoint:
        assert TextConfig.read(checkpoint).num_layers == 10
    other = tmp_path / "config.json"
    other.write_text('{"model_type": "llama"}', encoding="utf-8")
    with Checkpoint.open(toy("e2b"), config=other) as checkpoint, pytest.raises(ConfigError) as error:
        TextConfig.read(checkpoint)
    assert str(error.value).startswith(f"{checkpoint.source}: not a Gemma 4 config")
