"""Policy strings, the named table, and weights under a policy."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epic_quant import quantizer
from epic_quant.errors import QuantizationError, SpecError
from epic_quant.gemma4.tensors import TensorClass, TextTensor
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.kv import KVPolicy
from epic_quant.ple import PLEPolicy
from epic_quant.policy import NAMED, Policy

specs = st.sampled_from(["bf16", "int4", "int4-g128", "ternary", "absmax4", "absmax3-packed", "int8-g32"])
kvs = st.sampled_from(["bf16", "original", "p-rope", "k=int4@64/full.v.rotated=int8-g32+had64/recent=5/first=1"])
ples = st.just("all") | st.builds("{}:{}".format, st.sampled_from(["static", "lru"]), st.integers(1, 10**6))


of_layers = st.sampled_from(["sliding_attention", "full_attention", "mlp", "ple_projections"])


@given(
    st.dictionaries(st.sampled_from([*TensorClass]), specs),
    kvs,
    ples,
    st.dictionaries(st.tuples(of_layers.map(TensorClass), st.integers(0, 50)), specs),
)
def test_parse_and_str_are_inverses(said, kv, ple, by_layer):
    policy = Policy("some", said, KVPolicy.parse(kv), PLEPolicy.parse(ple), by_layer)
    assert Policy.parse(str(policy)) == policy
    assert str(Policy.parse(str(policy))) == str(policy)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_policy_reads_back_by_name_and_by_string(name):
    assert Policy.parse(name) is NAMED[name]
    assert Policy.parse(str(NAMED[name])) == NAMED[name]
    assert hash(Policy.parse(str(NAMED[name]))) == hash(NAMED[name])


def test_classes_that_are_not_said_stay_bf16():
    policy = Policy.parse("mlp=int4")
    assert policy.specs == {part: "int4" if part == "mlp" else "bf16" for part in TensorClass}
    assert policy.quantized_classes == (TensorClass.MLP,)
    assert str(policy.ple) == "all"


def test_layers_may_have_specs_of_their_own():
    policy = Policy.parse("mlp=int4,mlp@0-2+5=int8,mlp@4=bf16,full_attention@5=int3")
    mlp = ["int8", "int8", "int8", "int4", "bf16", "int8"]
    for layer, spec in enumerate(mlp):
        tensor = TextTensor("x", layer, TensorClass.MLP, (2, 2))
        assert policy.spec_of(tensor) == policy.at(layer).specs[TensorClass.MLP] == spec
        assert policy.at(layer).specs[TensorClass.FULL_ATTENTION] == ("int3" if layer == 5 else "bf16")
    assert policy.specs[TensorClass.MLP] == "int4"
    assert policy.quantized_classes == (TensorClass.FULL_ATTENTION, TensorClass.MLP)
    assert str(policy) == "full_attention@5=int3,mlp=int4,mlp@0-2+5=int8,mlp@4=bf16,kv=bf16,ple=all"
    # What says the same as the class says nothing.
    assert Policy.parse("mlp=int4,mlp@3=int4") == Policy.parse("mlp=int4")
    assert policy != Policy.parse("mlp=int4")


def test_weights_of_a_layer_are_quantized_as_that_layer_says(toy_checkpoint):
    weights = Policy.parse("mlp=int4,mlp@1=int8").weights(toy_checkpoint)
    assert weights.layer(0)["mlp.up_proj.weight"].spec == "int4"
    assert weights.layer(1)["mlp.up_proj.weight"].spec == "int8"


@pytest.mark.parametrize("text", ["mlp@12=int4", "full_attention@0=int4"])
def test_a_layer_that_the_model_does_not_have_is_said(text, toy_checkpoint):
    with pytest.raises(SpecError, match="of 12 layers there is none such"):
        Policy.parse(text).weights(toy_checkpoint)


def test_a_policy_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NAMED["bf16"].name = "other"
    with pytest.raises(TypeError):
        NAMED["bf16"].specs[TensorClass.MLP] = "int4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("original-2", "unknown policy 'original-2'; did you mean original-"),
        ("mpl=int4", "unknown tensor class 'mpl'; did you mean"),
        ("mlp=itn4", "unknown scheme 'itn4'"),
        ("mlp=int4,mlp=int3", "mlp is said twice"),
        ("mlp=int4,", "'' is not of the form class=spec"),
        ("mlp=", "'mlp=' is not of the form class=spec"),
        ("kv=int99", "unknown KV policy 'int99'"),
        ("mlp@=int4", "'' are no layers; expected numbers and ranges, such as 0-5+8"),
        ("mlp@5-3=int4", "'5-3' are no layers"),
        ("mlp@0-2=int4,mlp@2=int3", "layer 2 of mlp is said twice"),
        ("mpl@1=int4", "unknown tensor class 'mpl'"),
        ("kv@1=int4", "unknown tensor class 'kv'"),
        ("embedding@1=int4", "embedding is in no layer"),
        ("ple=lfu:10", "unknown PLE residency 'lfu'"),
        ("ple=lru", "every other residency needs one"),
        ("ple=all:7", "'all' takes no number of rows"),
        ("ple=lru:0", "must be positive"),
        ("ple=lru:many", "'many' is not a number of rows"),
    ],
)
def test_a_wrong_policy_is_one_clear_line(text, message):
    with pytest.raises(SpecError) as error:
        Policy.parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_are_quantized_as_their_class_says(toy_checkpoint):
    policy = Policy.parse("mlp=int4,full_attention=ternary")
    weights, plain = policy.weights(toy_checkpoint), CheckpointWeights(toy_checkpoint)
    for layer in weights.config.layers:
        expected = plain.layer(layer.index)
        for name, weight in weights.layer(layer.index).items():
            spec = policy.specs[plain.tensors[f"layers.{layer.index}.{name}"].tensor_class or TensorClass.EMBEDDING]
            if spec == "bf16":
                assert torch.equal(weight, expected[name])
            else:
                direct = quantizer(spec).quantize(expected[name])
                assert weight.spec == direct.spec
                assert torch.equal(weight.dequantize(), direct.dequantize())


def test_rows_of_a_quantized_table_are_those_of_the_whole_table_quantized(toy_checkpoint):
    name, ids = "embed_tokens_per_layer.weight", torch.tensor([5, 0, 5, 9])
    weights = Policy.parse("ple_table=int4,embedding=int8").weights(toy_checkpoint)
    whole = quantizer("int4").quantize(CheckpointWeights(toy_checkpoint).get(name)).dequantize()
    assert torch.equal(weights.rows(name, ids), whole[ids])
    assert weights.get("embed_tokens.weight").spec == "int8"


def test_a_weight_that_is_no_number_is_named(toy_checkpoint_with_nan):
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj\.weight.*row 3"):
        Policy.parse("mlp=int4").weights(toy_checkpoint_with_nan).layer(1)
