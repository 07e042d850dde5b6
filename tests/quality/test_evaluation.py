"""Evaluating by streaming, against `transformers` and against whole models with all logits."""

import math
import shutil
from collections import Counter
from dataclasses import astuple
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, QuantizationError, SpecError, TokenError
from epic_quant.gemma4.model import TextModel
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.kv import KVCache
from epic_quant.metrics import kl_divergence
from epic_quant.policy import PolicyWeights
from epic_quant.quality import Variant, evaluate, measure
from epic_quant.quality.passes import work
from epic_quant.quality.variants import with_reference
from epic_quant.quant import Hessian
from epic_quant.spec import NAMED, NOISE_FLOOR, REFERENCE, PolicySpec, TensorClass

TOYS = ["e4b", "e2b", "no_ple", "no_sharing", "one_layer", "all_full", "wide_ple", "other_rope"]
POLICIES = {
    text: PolicySpec.parse(text)
    for text in (
        "bf16",
        "original-1.58",
        "mlp=int4",
        "full_attention=ternary,mlp=int4",
        "mlp=int4,embedding=int4,ple_table=int4,ple_model_projection=int3",
        "kv=int4",
        "mlp=int4,kv=k=int4-b8/v=int4/residual=3",
        "kv=fp32/full.k.rotated=int2/full.k.unrotated=int4",
    )
}


def perplexity(logits, windows):
    """The exponential of the mean loss, as anybody would write it."""
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), windows[:, 1:].flatten())
    return float(loss.exp())


@pytest.mark.parametrize("name", TOYS)
def test_perplexity_is_that_of_transformers(name, toy, reference, windows, small_slices):
    logits = reference(name, torch.float32)(windows, output_hidden_states=True, use_cache=False).logits
    with Checkpoint.open(toy(name)) as checkpoint:
        ours = evaluate(checkpoint, {}, windows)
    assert ours[REFERENCE].perplexity == pytest.approx(perplexity(logits, windows), rel=1e-5)
    assert ours[REFERENCE].num_tokens == 48
    assert ours[NOISE_FLOOR].perplexity == pytest.approx(ours[REFERENCE].perplexity, rel=0.2)
    assert ours[NOISE_FLOOR].kl_divergence > 0


@pytest.fixture
def naive_logits(toy_checkpoint, windows):
    """Logits [3, 17, vocab] of a whole model under a policy, K and V of each window through a cache of its own."""

    def logits(policy, dtype=torch.float32):
        model = TextModel(PolicyWeights(toy_checkpoint, policy), dtype)
        if str(policy.kv) == "bf16":
            return model.logits(windows)
        caches = [KVCache(model.config, policy.kv) for _ in windows]
        return torch.cat([model.logits(one[None], cache) for one, cache in zip(windows, caches, strict=True)])

    return logits


@pytest.fixture
def agree(naive_logits, windows):
    def check(quality, logits):
        kl = kl_divergence(naive_logits(POLICIES["bf16"])[:, :-1], logits[:, :-1])
        assert quality.perplexity == pytest.approx(perplexity(logits, windows), rel=1e-5)
        assert quality.kl_divergence == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-9)
        assert quality.kl_max == pytest.approx(float(kl.max()), rel=1e-3, abs=1e-9)

    return check


def test_streaming_is_the_same_as_whole_models(toy_checkpoint, windows, naive_logits, agree, small_slices):
    """Full logits of every policy, from `TextModel` over `PolicyWeights`."""
    ours = evaluate(toy_checkpoint, POLICIES, windows)
    assert list(ours) == [*POLICIES, NOISE_FLOOR]
    for name, policy in POLICIES.items():
        agree(ours[name], naive_logits(policy))
    assert ours["mlp=int4"].kl_divergence > 1e-4
    assert ours["kv=int4"].kl_divergence > 1e-4


class SomeLayers:
    """The weights of one policy in some layers, of another elsewhere."""

    def __init__(self, checkpoint, policy, elsewhere, layers):
        self._here, self._else, self._layers = (
            *(PolicyWeights(checkpoint, one) for one in (policy, elsewhere)),
            layers,
        )
        self.config, self.get, self.rows = self._else.config, self._else.get, self._else.rows

    def layer(self, index):
        return (self._here if index in self._layers else self._else).layer(index)


@pytest.mark.parametrize("layers", [(0,), (7,), (11,), (2, 3, 11)])
def test_a_policy_can_be_that_of_single_layers(layers, toy_checkpoint, windows, agree):
    here, elsewhere = PolicySpec.parse("mlp=int3"), PolicySpec.parse("mlp=int8")
    some = PolicySpec.parse(f"mlp=int8,mlp@{'+'.join(map(str, layers))}=int3")
    model = TextModel(SomeLayers(toy_checkpoint, here, elsewhere, layers))
    ours = evaluate(toy_checkpoint, {"some": some}, windows)
    agree(ours["some"], model.logits(windows))


def test_equal_weights_diverge_by_no_more_than_rounding(toy_checkpoint, windows):
    """The cache quantizes nothing, since the residual window holds all tokens; so states alone differ."""
    ours = evaluate(toy_checkpoint, {"same": PolicySpec.parse("kv=int4/residual=99")}, windows)
    assert ours["same"].kl_max < 1e-9
    assert ours["same"].top1_agreement == 1
    assert ours["bf16"].kl_max == 0


def same(one, other):
    return {name: astuple(quality) for name, quality in one.items()} == {
        name: astuple(quality) for name, quality in other.items()
    }


def test_policies_share_their_states_and_change_no_bit_of_each_other(toy_checkpoint, windows):
    together = evaluate(toy_checkpoint, POLICIES, windows)
    for name in ("full_attention=ternary,mlp=int4", "kv=int4", "original-1.58"):
        alone = evaluate(toy_checkpoint, {name: POLICIES[name]}, windows)
        assert same({name: alone[name]}, {name: together[name]})


@pytest.fixture
def layers_read(monkeypatch):
    """Every layer of which a tensor is asked of the file, in order."""
    read, get = [], CheckpointWeights.get

    def counted(self, name):
        layer = self.tensors[name].layer
        if layer is not None and read[-1:] != [layer]:
            read.append(layer)
        return get(self, name)

    monkeypatch.setattr(CheckpointWeights, "get", counted)
    return read


def test_all_policies_take_one_read_of_every_layer(toy_checkpoint, windows, layers_read):
    evaluate(toy_checkpoint, POLICIES, windows)
    assert layers_read == list(range(12))


def test_a_weight_of_a_layer_is_read_once_for_all_policies_that_store_it_alike(toy_checkpoint, windows, monkeypatch):
    read, tensor = [], Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: read.append(name) or tensor(self, name))
    evaluate(toy_checkpoint, POLICIES, windows)
    weights = CheckpointWeights(toy_checkpoint)
    expected = {
        t.name: len({Variant(policy).key(t) for policy in POLICIES.values()})
        for t in weights.tensors.values()
        if t.layer is not None and not t.unused
    }
    assert Counter(name.removeprefix("model.") for name in read if ".layers." in name) == expected


@pytest.mark.parametrize("number", [1, 2, 4])
def test_multiplications_grow_linearly_with_tokens_and_policies(number, toy_checkpoint, windows):
    """Those that torch really does, which are also the ones that the plan counts: of layers and of the head.

    What comes before the first layer is done once for every distinct token, however many there are of it.
    """
    policies = [PolicySpec.parse(f"sliding_attention=int{bits}") for bits in (3, 4, 5, 6)][:number]
    variants = {str(policy): policy for policy in policies}
    config = CheckpointWeights(toy_checkpoint).config
    model_projection = config.num_layers * config.ple_dim * config.hidden_size

    def done(windows):
        with FlopCounterMode(display=False) as counter:
            measure(toy_checkpoint, variants, windows)
        return counter.get_total_flops() // 2 - len(windows.unique()) * model_projection

    def planned(windows):
        head = (
            config.vocab_size * config.hidden_size * len(windows) * (1 + number)
        )  # of the last token nothing is asked
        return sum(work(list(with_reference(variants, config).values()), config, *windows.shape)) - head

    alone = planned(windows) // (1 + number)  # as much for each policy as for the reference
    once = done(windows)
    assert once == planned(windows) == (1 + number) * alone
    assert done(windows.repeat(2, 1)) == 2 * once


def test_less_memory_takes_more_passes_to_the_same_bits(toy_checkpoint, windows, layers_read, tight_memory):
    whole = evaluate(toy_checkpoint, POLICIES, windows)
    layers_read.clear()
    few = evaluate(toy_checkpoint, POLICIES, windows, memory_nbytes=tight_memory(POLICIES))
    assert layers_read[:12] == list(range(12))
    assert len(layers_read) in range(24, 97, 12)
    assert same(few, whole)


def test_too_little_memory_for_a_single_policy_is_an_error(toy_checkpoint, windows, layers_read):
    with pytest.raises(TokenError, match=r"3 windows of 17 tokens need .* 0\.00 GB are allowed; take fewer windows"):
        evaluate(toy_checkpoint, POLICIES, windows, memory_nbytes=1000)
    assert layers_read == []


def test_error_compensation_is_fitted_with_the_hessians(toy_checkpoint, windows):
    """With the identity for Hessians nothing is compensated, so it is the plain scheme; without any it is refused."""
    gptq, plain = PolicySpec.parse("ple_projections=int4+gptq"), PolicySpec.parse("ple_projections=int4")
    hessians = {
        tensor.name: Hessian(partial(torch.eye, tensor.shape[1]))
        for tensor in CheckpointWeights(toy_checkpoint).tensors.values()
        if tensor.tensor_class is TensorClass.PLE_PROJECTIONS
    }
    ours = evaluate(toy_checkpoint, {"gptq": gptq, "plain": plain}, windows, hessians=hessians)
    assert ours["gptq"].kl_divergence == pytest.approx(ours["plain"].kl_divergence, rel=1e-6)
    with pytest.raises(QuantizationError, match=r"layers\.0\.per_layer_input_gate\.weight"):
        evaluate(toy_checkpoint, {"gptq": gptq}, windows)


def test_a_damaged_weight_is_named(toy_checkpoint_with_nan, windows):
    with pytest.raises(CheckpointError, match="under bf16 the hidden states after layer 1 are not finite"):
        evaluate(toy_checkpoint_with_nan, {}, windows)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "norm.weight"])
def test_what_the_head_alone_shows_is_named_too(name, value, toy, windows, tmp_path):
    folder = shutil.copytree(toy("e4b"), tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.{name}"][1] = value  # token 1 is in no window
    save_file(tensors, folder / "model.safetensors")
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(CheckpointError, match=f"under bf16 {name} has NaN or infinity$"),
    ):
        evaluate(checkpoint, {}, windows)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[2, 5, 6], [7, 5, 6]], "window 1 begins with token 7; expected BOS, 2"),
        ([[2], [2]], "windows of 1 token have nothing to predict; expected 2 tokens or more"),
        ([[2, 120]], "token id 120 is out of range; expected 0 to 119"),
        ([2, 5, 6], r"of shape \[3\]; expected \[batch, tokens\]"),
        ([[2.0, 5.0]], "token ids are torch.float32; expected integers"),
    ],
)
def test_wrong_windows_are_one_clear_line(ids, message, toy_checkpoint):
    with pytest.raises(TokenError, match=message):
        measure(toy_checkpoint, {}, torch.tensor(ids))


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ({REFERENCE: PolicySpec.parse("mlp=int4")}, "'bf16' is the reference, the checkpoint's own weights"),
        ({NOISE_FLOOR: NAMED["int8"]}, "'bf16-compute' is the noise floor"),
        ({"x": PolicySpec.parse("kv@12=int8")}, "x: kv@12=int8: this model has layers 0 to 11"),
    ],
)
def test_wrong_policies_are_one_clear_line(policies, message, toy_checkpoint, windows):
    with pytest.raises(SpecError, match=message):
        evaluate(toy_checkpoint, policies, windows)


def test_a_group_that_does_not_fit_names_the_tensor(toy_checkpoint, windows):
    with pytest.raises(SpecError, match=r"x: int4-g32: a group of 32 .* \(layers\.0\.mlp\.gate_proj\.weight\)"):
        evaluate(toy_checkpoint, {"x": PolicySpec.parse("mlp=int4-g32")}, windows)


def test_a_bar_is_shown_where_it_is_asked_for(toy_checkpoint, windows, capsys):
    evaluate(toy_checkpoint, POLICIES, windows, progress=True)
    printed = capsys.readouterr().err
    assert "layer 12 of 12, 9 policies, pass 1 of 1" in printed
    assert "elapsed" in printed
    assert "left" in printed
    evaluate(toy_checkpoint, {}, windows, progress=None)
    assert capsys.readouterr().err == ""
