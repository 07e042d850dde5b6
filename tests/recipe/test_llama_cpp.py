"""Arguments of llama-quantize: every tensor is matched once, by its own type."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.recipe.llama_cpp import BITS, nearest_type, tensor_type_arguments
from epic_quant.spec import KINDS, Target, TensorClass, WeightSpec

LAYERS = [TensorClass.SLIDING_ATTENTION, TensorClass.FULL_ATTENTION, TensorClass.SLIDING_ATTENTION]

# What a GGUF file of three layers calls the kinds of Gemma 4's tensors: gguf-py's MODEL_TENSOR_NAMES.
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "per_layer_input_gate": "inp_gate", "per_layer_projection": "proj",
}  # fmt: skip
TENSORS = {
    "per_layer_token_embd.weight": Target(TensorClass.PLE_TABLE),
    "token_embd.weight": Target(TensorClass.EMBEDDING),
}
for _layer, _attention in enumerate(LAYERS):
    for _class in (_attention, TensorClass.MLP, TensorClass.PLE_PROJECTIONS):
        for _kind in KINDS[_class]:
            TENSORS[f"blk.{_layer}.{NAMES[_kind]}.weight"] = Target(_class, _kind, _layer)
OTHERS = ("per_layer_model_proj.weight", "blk.0.attn_q_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")

types = st.sampled_from(sorted(BITS))


def types_in(arguments, name):
    """The types that the tool finds for a tensor: it searches the expression before the last = in the name."""
    parts = (argument.rpartition("=") for argument in arguments)
    return [ggml_type for pattern, _, ggml_type in parts if re.search(pattern, name)]


@given(st.fixed_dictionaries(dict.fromkeys(TENSORS.values(), types)))
def test_every_tensor_is_matched_once_by_its_own_type(chosen):
    arguments = tensor_type_arguments(chosen)
    for name, target in TENSORS.items():
        assert types_in(arguments, name) == [chosen[target]]
    for name in OTHERS:
        assert types_in(arguments, name) == []
    # The tool makes the expressions lower case.
    assert all(argument.rpartition("=")[0] == argument.rpartition("=")[0].lower() for argument in arguments)


def test_tensors_that_agree_share_an_argument():
    chosen = dict.fromkeys(TENSORS.values(), "q4_K") | {Target(TensorClass.MLP, "down_proj", 1): "q6_K"}
    assert len(tensor_type_arguments(chosen)) == 5
    assert r"^blk\.(1)\.(ffn_down)\.weight$=q6_K" in tensor_type_arguments(chosen)


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
        ("q4_k", 4.5, "q4_K"),
        ("q4_0", 4.5, "q4_0"),
        ("iq4_nl", 4.5, "iq4_nl"),
        ("q5_0", 5.5, "q5_0"),
        ("tq2_0", 2.0625, "tq2_0"),
    ],
)
def test_ggmls_own_formats_are_themselves_and_others_the_nearest_with_as_many_levels(spec, bits, expected):
    assert nearest_type(WeightSpec.parse(spec), bits) == expected


def test_bits_are_those_that_llama_cpp_documents():
    assert BITS == {
        "q2_K": 2.625, "q3_K": 3.4375, "q4_K": 4.5, "q5_K": 5.5, "q6_K": 6.5625, "q8_0": 8.5,
        "q5_0": 5.5, "q4_0": 4.5, "iq4_nl": 4.5, "tq1_0": 1.6875, "tq2_0": 2.0625, "bf16": 16.0,
    }  # fmt: skip
