"""Weights under a policy, the bytes that they take, and policies that do not fit a model."""

import math

import pytest
import torch

from epic_quant import quantize
from epic_quant.errors import QuantizationError, SpecError
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.policy import PolicyWeights, check, spec_of, tensor_nbytes
from epic_quant.quant import Hessian, OutputHessian
from epic_quant.spec import BF16, PolicySpec, WeightSpec


def weights_under(checkpoint, text):
    return PolicyWeights(checkpoint, PolicySpec.parse(text))


def test_a_tensor_is_stored_as_its_layer_and_kind_say(toy_checkpoint):
    weights = weights_under(toy_checkpoint, "mlp=int4,mlp@1=int8,mlp.down_proj=int6")
    specs = [
        {name: str(weights.layer(layer)[f"mlp.{name}_proj.weight"].spec) for name in ("up", "down")} for layer in (0, 1)
    ]
    assert specs == [{"up": "int4", "down": "int6"}, {"up": "int8", "down": "int6"}]


@pytest.mark.parametrize("text", ["mlp@12=int4", "full_attention@0=int4", "full_attention.q_proj@0=int4", "kv@12=int4"])
def test_a_layer_that_the_model_does_not_have_is_refused(text, toy_checkpoint):
    with pytest.raises(SpecError, match=r"this model (of 12 layers has no such tensor|has layers 0 to 11)"):
        weights_under(toy_checkpoint, text)


def test_a_group_that_does_not_divide_the_rows_is_refused_before_anything_is_read(toy_checkpoint):
    with pytest.raises(SpecError, match=r"int4-g32: a group of 32 .* 48 weights \(layers\.0\.mlp\.gate_proj\.weight"):
        weights_under(toy_checkpoint, "mlp=int4-g32")
    with pytest.raises(SpecError, match=r"q4_k: rows of 48 weights are no multiple of 256 \(layers\.0\.mlp\.gate_proj"):
        weights_under(toy_checkpoint, "mlp=q4_k")


def test_weights_are_quantized_as_their_class_says(toy_checkpoint):
    policy = PolicySpec.parse("mlp=int4,full_attention=ternary")
    weights, plain = PolicyWeights(toy_checkpoint, policy), CheckpointWeights(toy_checkpoint)
    for layer in weights.config.layers:
        expected = plain.layer(layer.index)
        for name, weight in weights.layer(layer.index).items():
            spec = spec_of(policy, plain.tensors[f"layers.{layer.index}.{name}"])
            if spec in (None, BF16):
                assert torch.equal(weight, expected[name])
            else:
                direct = quantize(expected[name], spec)
                assert weight.spec == direct.spec
                assert torch.equal(weight.dequantize(), direct.dequantize())


def test_rows_of_a_quantized_table_are_those_of_the_whole_table_quantized(toy_checkpoint):
    name, ids = "embed_tokens_per_layer.weight", torch.tensor([5, 0, 5, 9])
    weights = weights_under(toy_checkpoint, "ple_table=int4,embedding=int8")
    whole = quantize(CheckpointWeights(toy_checkpoint).get(name), WeightSpec("int4")).dequantize()
    assert torch.equal(weights.rows(name, ids), whole[ids])
    assert str(weights.get("embed_tokens.weight").spec) == "int8"


def test_pieces_of_rows_that_make_up_for_each_other_are_those_of_the_whole(toy_checkpoint, monkeypatch):
    monkeypatch.setattr("epic_quant.policy._PIECE", 1000)
    name = "layers.0.mlp.gate_proj.weight"
    rows, cols = CheckpointWeights(toy_checkpoint).get(name).shape
    x, gradients = (torch.randn(200, n, generator=torch.Generator().manual_seed(n)).cumsum(1) for n in (cols, rows))
    outputs = OutputHessian(lambda: (gradients.T @ gradients).unsqueeze(0))
    hessians = {name: Hessian(lambda: x.T @ x, outputs)}
    weights = PolicyWeights(toy_checkpoint, PolicySpec.parse("mlp=int4+yaqa"), hessians)
    pieces = [piece.dequantize() for piece in weights.pieces(name)]
    assert len(pieces) > 1
    assert torch.equal(torch.cat(pieces), weights.get(name).dequantize())


def test_a_weight_that_is_no_number_is_named(toy_checkpoint_with_nan):
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj\.weight.*row 3"):
        weights_under(toy_checkpoint_with_nan, "mlp=int4").layer(1)


def test_bytes_of_a_tensor_are_those_that_are_stored(toy_checkpoint):
    policy = PolicySpec.parse("mlp=int4-g16,full_attention=ternary,embedding=int8")
    weights = PolicyWeights(toy_checkpoint, policy)
    for tensor in weights.tensors.values():
        stored = weights.get(tensor.name)
        plain = 2 * math.prod(tensor.shape)
        assert tensor_nbytes(policy, tensor) == (plain if isinstance(stored, torch.Tensor) else stored.nbytes)
        assert weights.nbytes(tensor.name) == tensor_nbytes(policy, tensor)


def test_a_policy_is_checked_from_the_config_alone(e4b):
    check(PolicySpec.parse("mlp.down_proj@41=int4-g128,kv@3=int4"), e4b)
    check(PolicySpec.parse("mlp=q4_k,sliding_attention=q2_k,ple_table=q8_0,embedding=q6_k,ple_projections=tq1_0"), e4b)
    with pytest.raises(SpecError, match="mlp@42=int4"):
        check(PolicySpec.parse("mlp@42=int4"), e4b)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kv=int4-g5", r"int4-g5 does not fit the (16|32) dims of layer \d's heads: a group of 5"),
        ("kv@5=k=int4-g12/v=int4", "does not fit the 32 dims of layer 5's heads: a group of 12"),
        ("kv=k=int4+center8+pca16-int8/v=int4", "16 directions leave nothing of 16 dims"),
        ("ple_projections@3=int4-g32", r"32 does not divide rows of 48 weights \(layers.3.per_layer_input_gate"),
        ("ple_table=int4-g7", r"7 does not divide rows of 96 weights \(embed_tokens_per_layer"),
    ],
)
def test_what_does_not_fit_the_shapes_is_refused_by_the_config_alone(text, said, toy_checkpoint):
    with pytest.raises(SpecError, match=said):
        check(PolicySpec.parse(text), TextConfig.read(toy_checkpoint))


@pytest.mark.parametrize("text", ["kv=int4-g8", "kv@5=int4-g32", "kv=int4+had512", "mlp=int4+had256", "ple=lru:5000"])
def test_what_fits_is_not(text, toy_checkpoint):
    check(PolicySpec.parse(text), TextConfig.read(toy_checkpoint))
