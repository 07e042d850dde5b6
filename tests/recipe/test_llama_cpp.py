import re

import pytest

from epic_quant.errors import RecipeError
from epic_quant.recipe.llama_cpp import BITS, nearest_type, tensor_type_arguments

LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

# What a GGUF file of three layers holds of Gemma 4's text, with the class that each tensor is in.
TENSORS = {"per_layer_token_embd.weight": "ple_table", "token_embd.weight": "embedding"}
for _layer, _attention in enumerate(LAYER_TYPES):
    TENSORS |= {f"blk.{_layer}.attn_{part}.weight": _attention for part in ("q", "k", "v", "output")}
    TENSORS |= {f"blk.{_layer}.ffn_{part}.weight": "mlp" for part in ("gate", "up", "down")}
    TENSORS |= {f"blk.{_layer}.{part}.weight": "ple_projections" for part in ("inp_gate", "proj")}
OTHERS = ("per_layer_model_proj.weight", "blk.0.attn_q_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")


def types_in(arguments, name):
    """The types that the tool finds for a tensor: it searches the expression before the last = in the name."""
    said = (argument.rpartition("=") for argument in arguments)
    return [ggml_type for pattern, _, ggml_type in said if re.search(pattern, name)]


@pytest.mark.parametrize(
    ("spec", "bits", "expected"),
    [
        ("bf16", 16.0, "bf16"),
        ("int8-g128", 8.125, "q8_0"),
        ("int6-g128", 6.125, "q6_K"),
        ("int5-g128", 5.125, "q5_K"),
        ("int4-g128", 4.125, "q4_K"),
        ("int3-g128", 3.125, "q3_K"),
        ("int2-g128", 2.125, "q2_K"),
        ("ternary-g128", 1.745, "tq1_0"),
        ("ternary+had256", 1.6, "tq1_0"),
        ("absmax-ternary", 2.06, "tq2_0"),
    ],
)
def test_the_nearest_type_is_of_the_same_kind(spec, bits, expected):
    assert nearest_type(spec, bits) == expected


def test_bits_are_those_that_llama_cpp_documents():
    assert BITS == {
        "q2_K": 2.625, "q3_K": 3.4375, "q4_K": 4.5, "q5_K": 5.5, "q6_K": 6.5625, "q8_0": 8.5,
        "tq1_0": 1.6875, "tq2_0": 2.0625, "bf16": 16.0,
    }  # fmt: skip


def test_arguments_are_these():
    types = {("sliding_attention", None): "q4_K", ("full_attention", None): "q6_K", ("mlp", None): "q3_K"}
    assert tensor_type_arguments(types, LAYER_TYPES) == [
        r"^blk\.(0|2)\.attn_(q|k|v|output)\.weight$=q4_K",
        r"^blk\.(1)\.attn_(q|k|v|output)\.weight$=q6_K",
        r"^blk\.\d+\.ffn_(gate|up|down)\.weight$=q3_K",
        r"^blk\.\d+\.(inp_gate|proj)\.weight$=bf16",
        r"^per_layer_token_embd\.weight$=bf16",
        r"^token_embd\.weight$=bf16",
    ]


@pytest.mark.parametrize("same", [False, True])
def test_every_tensor_is_matched_once_by_the_type_of_its_class(same):
    names = ["q4_K", "q4_K" if same else "q5_K", "q6_K", "q8_0", "q2_K", "q3_K"]
    classes = ["sliding_attention", "full_attention", "mlp", "ple_projections", "ple_table", "embedding"]
    types = dict(zip(classes, names, strict=True))
    arguments = tensor_type_arguments({(key, None): name for key, name in types.items()}, None if same else LAYER_TYPES)
    for name, tensor_class in TENSORS.items():
        assert types_in(arguments, name) == [types[tensor_class]]
    for name in OTHERS:
        assert types_in(arguments, name) == []


def test_layers_of_a_class_have_types_of_their_own():
    types = {("mlp", 0): "q4_K", ("mlp", 1): "q8_0", ("mlp", 2): "q4_K", ("sliding_attention", 2): "q3_K"}
    types |= {("sliding_attention", 0): "q2_K"}
    arguments = tensor_type_arguments(types, LAYER_TYPES)
    assert r"^blk\.(0|2)\.ffn_(gate|up|down)\.weight$=q4_K" in arguments
    for name, tensor_class in TENSORS.items():
        layer = int(name.split(".")[1]) if name.startswith("blk") else None
        assert types_in(arguments, name) == [types.get((tensor_class, layer), "bf16")]


def test_expressions_survive_the_tool_which_makes_them_lower_case():
    for argument in tensor_type_arguments({}, LAYER_TYPES):
        pattern = argument.rpartition("=")[0]
        assert pattern == pattern.lower()
        assert "=" not in pattern


def test_a_run_that_does_not_tell_layers_apart_is_told():
    with pytest.raises(RecipeError, match="which layers are full"):
        tensor_type_arguments({("full_attention", None): "q6_K"}, None)
