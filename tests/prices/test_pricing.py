"""Derivatives against sums written out, and prices against the divergence that is measured."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from epic_quant.calibration import gather
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, SpecError, TokenError
from epic_quant.gemma4.tensors import expected_tensors
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.plan import plan_prices
from epic_quant.plugin.run import SMALL_MODEL
from epic_quant.prices import needed_nbytes, price
from epic_quant.prices.backward import Backward, HeadRows, KeysValues, Linear, Rows
from epic_quant.quant import Hessian, quantize
from epic_quant.spec import KVSpec, PolicySpec, WeightSpec

from .conftest import WINDOWS

MINI = Path(__file__).resolve().parents[2] / SMALL_MODEL
INT4, INT8 = WeightSpec.parse("int4-g16"), WeightSpec.parse("int8-g16")


def priced(prices, name):
    return prices.by_name[name]


def error_of(weights, name, spec, hessian=None):
    """ΔW in fp64."""
    weight = weights.get(name)
    return quantize(weight, spec, hessian).dequantize().double() - weight.double()


def test_derivatives_are_the_gradients_times_the_errors_of_the_outputs(toy_checkpoint):
    """S = δᵀ ΔW x of every token; of a table δᵀ Δrow, and of the tied embedding both of its ends."""
    weights = CheckpointWeights(toy_checkpoint)
    prices = price(toy_checkpoint, WINDOWS, [INT4, INT8])
    expected = {}
    for one in Backward(weights, WINDOWS, seed=0).run():
        if isinstance(one, Linear):
            error = error_of(weights, one.name, INT4)
            expected[one.name] = torch.einsum("tr,rc,tc->t", one.gradient.double(), error, one.x.double())
        elif isinstance(one, Rows):
            error = error_of(weights, one.name, INT4)[one.ids]
            expected[one.name] = expected.get(one.name, 0) + (one.gradient.double() * error).sum(1)
        elif isinstance(one, HeadRows):
            name = "embed_tokens.weight"
            error = error_of(weights, name, INT4)[one.first : one.first + len(one.weight)]
            s = torch.einsum("tr,rc,tc->t", one.gradient.double(), error, one.x.double())
            expected[name] = expected.get(name, 0) + s
    assert set(expected) == {one.name for one in prices.tensors}
    for name, s in expected.items():
        found = priced(prices, name).derivatives[0]
        np.testing.assert_allclose(found, s.numpy(), rtol=1e-3, atol=1e-4 * float(s.abs().max()))


def test_the_diagonal_form_is_the_summed_gradient_times_the_error_squared(toy_checkpoint):
    weights = CheckpointWeights(toy_checkpoint)
    prices = price(toy_checkpoint, WINDOWS, [INT4])
    for one in Backward(weights, WINDOWS, seed=0).run():
        if isinstance(one, Linear):
            summed = one.gradient.double().T @ one.x.double()
            expected = 0.5 * float((summed * error_of(weights, one.name, INT4)).square().sum()) / (3 * 8)
            assert priced(prices, one.name).diagonal[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("stage", ["gptq", "yaqa"])
def test_error_compensation_is_priced_with_the_hessian_given(stage, toy_checkpoint, tmp_path):
    text = tmp_path / "calibration.txt"
    text.write_text("some text", encoding="utf-8")
    path, windows = tmp_path / "hessians.safetensors", WINDOWS.repeat(8, 1)
    hessians = gather(toy_checkpoint, text, windows, path, outputs=stage == "yaqa")
    gptq = WeightSpec.parse(f"int4-g16+{stage}")
    prices = price(toy_checkpoint, WINDOWS, [INT4, gptq], hessians=hessians)
    weights = CheckpointWeights(toy_checkpoint)
    for one in Backward(weights, WINDOWS, seed=0).run():
        if isinstance(one, Linear):
            assert priced(prices, one.name).candidates == (str(INT4), str(gptq))
            error = error_of(weights, one.name, gptq, hessians[one.name])
            s = torch.einsum("tr,rc,tc->t", one.gradient.double(), error, one.x.double())
            found = priced(prices, one.name).derivatives[1]
            np.testing.assert_allclose(found, s.numpy(), rtol=1e-3, atol=1e-4 * float(s.abs().max()))
    # Tables have no inputs to compensate errors for; without Hessians nothing has.
    assert priced(prices, "embed_tokens.weight").candidates == (str(INT4),)
    without = price(toy_checkpoint, WINDOWS, [INT4, gptq])
    assert all(one.candidates == (str(INT4),) for one in without.tensors)


def test_importance_comes_from_the_pass_itself_without_hessians():
    """Of every layer and of the head, to which the embedding is tied; what is only looked up has none."""
    fitted, down, embedding = WeightSpec.parse("q8_0+imatrix"), "layers.0.mlp.down_proj.weight", "embed_tokens.weight"
    with Checkpoint.open(MINI) as checkpoint:
        prices = price(checkpoint, WINDOWS, [fitted])
        weights = CheckpointWeights(checkpoint)
        expected = dict.fromkeys((down, embedding), torch.zeros(WINDOWS.numel(), dtype=torch.float64))
        for one in Backward(weights, WINDOWS, seed=0).run():
            if isinstance(one, HeadRows) or getattr(one, "name", "") == down:
                name = down if isinstance(one, Linear) else embedding
                error = error_of(weights, name, fitted, torch.diag(one.x.square().mean(0)))
                expected[name] = expected[name] + torch.einsum(
                    "tr,rc,tc->t", one.gradient.double(), error, one.x.double()
                )
            elif isinstance(one, Rows) and one.name == embedding:
                looked_up = error_of(
                    weights, embedding, fitted, torch.diag(torch.from_numpy(prices.importance[embedding]))
                )
                expected[embedding] = expected[embedding] + (one.gradient.double() * looked_up[one.ids]).sum(1)
    for name, s in expected.items():
        found = priced(prices, name).derivatives[0]
        np.testing.assert_allclose(found, s.numpy(), rtol=1e-3, atol=1e-3 * float(s.abs().max()))
    without = {"embed_tokens_per_layer.weight"}
    assert {one.name for one in prices.tensors if not one.candidates} == without
    assert set(prices.importance) == {one.name for one in prices.tensors} - without


def test_an_error_that_all_keys_have_in_common_costs_nothing(toy_checkpoint):
    """Softmax does not know a number added to all scores of a query: gradients at a window's keys sum to zero."""
    for one in Backward(CheckpointWeights(toy_checkpoint), WINDOWS, seed=0).run():
        if isinstance(one, KeysValues):
            assert one.k_gradient.sum(2).norm() < 1e-5 * one.k_gradient.norm()
            assert one.v_gradient.sum(2).norm() > 1e-2 * one.v_gradient.norm()


def test_k_and_v_are_priced_by_what_a_cache_changes_of_them(toy_checkpoint):
    """int8 is one scale a token and head, so a head's rows are rows of a matrix."""
    spec = KVSpec.parse("int8")
    prices = price(toy_checkpoint, WINDOWS, [INT8], [KVSpec(), spec])
    weights = CheckpointWeights(toy_checkpoint)
    found = {}
    for one in Backward(weights, WINDOWS, seed=0).run():
        if isinstance(one, KeysValues):
            s = torch.zeros(WINDOWS.shape)
            for x, gradient in ((one.k, one.k_gradient), (one.v, one.v_gradient)):
                error = quantize(x.flatten(0, 2), WeightSpec.parse("int8")).dequantize().view_as(x) - x
                if x is one.k:
                    error -= error.mean(2, keepdim=True)
                s += (error * gradient).sum(-1).sum(1)
            found[one.layer] = s.flatten()
    assert [one.layer for one in prices.kv] == sorted(found)
    for one in prices.kv:
        assert one.candidates == (str(spec),)
        np.testing.assert_allclose(one.derivatives[0], found[one.layer].numpy(), rtol=2e-2, atol=1e-4)


SAMPLES = 500


@pytest.fixture(scope="module")
def many_samples(toy):
    """Prices of a slight error, with so many samples of labels that they are near their expectation."""
    with Checkpoint.open(toy("e4b")) as checkpoint:
        return price(checkpoint, WINDOWS, [INT8], samples=SAMPLES)


def measured_divergence(model, weights, name):
    """KL divergence a token of `transformers`' model in fp64 when one tensor is as INT8 stores it."""
    parameter = dict(model.model.named_parameters())[name]
    logits = []
    kept = parameter.detach().clone()
    try:
        for error in (0, error_of(weights, name, INT8)):
            with torch.no_grad():
                parameter.copy_(kept + error)
            logits.append(model(WINDOWS, output_hidden_states=True, use_cache=False).logits[:, :-1].log_softmax(-1))
    finally:
        with torch.no_grad():
            parameter.copy_(kept)
    return float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())


@pytest.mark.parametrize(
    "name",
    [
        "layers.11.mlp.down_proj.weight",
        "layers.11.mlp.gate_proj.weight",
        "layers.11.self_attn.o_proj.weight",
        "layers.11.per_layer_projection.weight",
    ],
)
def test_a_price_is_the_divergence_where_no_attention_follows(name, many_samples, toy_checkpoint, reference):
    """A token's error then reaches its own prediction alone, so ½ mean s² has the divergence as its expectation."""
    expected = measured_divergence(reference("e4b", torch.float64), CheckpointWeights(toy_checkpoint), name)
    predicted, error = many_samples.price(priced(many_samples, name), str(INT8))
    assert error < 0.1 * expected
    assert abs(predicted - expected) < 4 * error + 0.02 * expected


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.self_attn.k_proj.weight",
        "layers.5.self_attn.v_proj.weight",
        "layers.2.mlp.up_proj.weight",
        "layers.7.self_attn.q_proj.weight",
        "per_layer_model_projection.weight",
        "embed_tokens.weight",
        "embed_tokens_per_layer.weight",
    ],
)
def test_derivatives_summed_over_a_window_have_its_divergence(name, many_samples, toy_checkpoint, reference):
    """Exact for every tensor: a window's sum is the derivative of its loss, whose mean square is the Fisher form."""
    expected = measured_divergence(reference("e4b", torch.float64), CheckpointWeights(toy_checkpoint), name)
    s = priced(many_samples, name).derivatives[0].astype(np.float64)
    squares = 0.5 * s.reshape(SAMPLES * len(WINDOWS), -1).sum(1) ** 2 / (WINDOWS.shape[1] - 1)
    error = squares.std() / len(squares) ** 0.5
    assert error < 0.1 * expected
    assert abs(squares.mean() - expected) < 4 * error + 0.02 * expected


def test_the_standard_error_is_that_of_repeated_draws(toy_checkpoint):
    """Of 30 seeds the spread of a price is what each says of itself."""
    name = "layers.11.mlp.down_proj.weight"
    found = [price(toy_checkpoint, WINDOWS.repeat(4, 1), [INT8], seed=seed) for seed in range(30)]
    prices, errors = zip(*(one.price(priced(one, name), str(INT8)) for one in found), strict=True)
    assert 0.5 < np.std(prices) / np.mean(errors) < 2


def test_bytes_are_those_that_are_stored(toy_checkpoint):
    prices = price(toy_checkpoint, WINDOWS, [INT4, INT8])
    weights = CheckpointWeights(toy_checkpoint)
    for one in prices.tensors:
        for candidate, nbytes in zip(one.candidates, one.nbytes, strict=True):
            assert nbytes == quantize(weights.get(one.name), WeightSpec.parse(candidate)).nbytes
        assert one.whole_nbytes == weights.nbytes(one.name)
    assert {one.target for one in prices.tensors} == {
        t.target for t in weights.tensors.values() if t.tensor_class and not t.unused
    }


def test_a_prediction_adds_derivatives_before_they_are_squared(toy_checkpoint):
    prices = price(toy_checkpoint, WINDOWS, [INT4])
    policy = PolicySpec.parse("mlp.down_proj=int4-g16,embedding=int4-g16")
    chosen = [one for one in prices.tensors if one.name == "embed_tokens.weight" or "down_proj" in one.name]
    total = sum(one.derivatives[0].astype(np.float64) for one in chosen)
    prediction = prices.predict(policy)
    assert prediction.kl_divergence == pytest.approx(0.5 * (total**2).sum() / prices.num_predicted, rel=1e-6)
    assert prediction.alone == pytest.approx(sum(prices.price(one, "int4-g16")[0] for one in chosen), rel=1e-6)


def test_prices_say_what_they_are_of(toy_checkpoint):
    prices = price(toy_checkpoint, WINDOWS, [INT4], samples=2, seed=3, facts={"text_sha256": "abc"})
    assert prices.num_predicted == 2 * 3 * 8
    facts = prices.facts
    assert facts["checkpoint"] == toy_checkpoint.fingerprint
    assert (facts["samples"], facts["seed"], facts["text_sha256"]) == (2, 3, "abc")
    assert facts["windows"] != price(toy_checkpoint, WINDOWS.flip(0), [INT4]).facts["windows"]


def test_a_group_is_halved_until_it_divides_the_rows_of_the_whole_class(toy_checkpoint):
    """Rows of the MLP have 48 and 80 weights, of which 16 are the largest part of a power of two."""
    prices = price(toy_checkpoint, WINDOWS, [WeightSpec.parse("int4-g64")])
    assert {one.candidates for one in prices.tensors if "mlp" in one.name} == {("int4-g16",)}


def test_a_ggml_type_is_priced_where_its_blocks_divide_the_rows_of_the_whole_class(toy_checkpoint):
    """Only rows of the PLE table, of 96 weights, are whole blocks of 32; none is one of 256."""
    prices = price(toy_checkpoint, WINDOWS, [INT4, WeightSpec.parse("q8_0")])
    assert [(one.name, one.candidates) for one in prices.tensors if "q8_0" in one.candidates] == [
        ("embed_tokens_per_layer.weight", ("int4-g16", "q8_0"))
    ]
    with pytest.raises(SpecError, match="q4_k fits no tensor"):
        price(toy_checkpoint, WINDOWS, [INT4, WeightSpec.parse("q4_k")])


def test_windows_of_one_token_have_nothing_to_predict(toy_checkpoint):
    with pytest.raises(TokenError, match=r"windows of shape \[3, 1\] have nothing to predict"):
        price(toy_checkpoint, WINDOWS[:, :1], [INT4])


def test_a_spec_that_fits_no_tensor_is_refused_by_name(toy_checkpoint):
    with pytest.raises(SpecError, match="int4-g7 fits no tensor"):
        price(toy_checkpoint, WINDOWS, [INT4, WeightSpec.parse("int4-g7")])


def test_a_weight_that_is_no_number_is_refused(toy_checkpoint_with_nan):
    with pytest.raises(CheckpointError, match="layer 1 is not finite"):
        price(toy_checkpoint_with_nan, WINDOWS, [INT4])


@pytest.mark.slow
def test_pricing_takes_no_more_memory_than_planned(few_layers_of_e4b, peak, capsys):
    """In reduced precision, with error compensation, on 1,024 tokens of three layers of E4B's shape."""
    windows = torch.randint(3, 2**15, (1, 1024), generator=torch.Generator().manual_seed(0))
    specs = [WeightSpec.parse(text) for text in ("int4-g128", "codebook3+had256+gptq")]
    with Checkpoint.open(few_layers_of_e4b) as checkpoint:
        weights = CheckpointWeights(checkpoint)
        needed, _ = needed_nbytes(weights.config, windows.numel(), specs, reduced_precision=True)
        hessians = {
            tensor.name: Hessian(partial(torch.eye, tensor.shape[1]))
            for tensor in weights.tensors.values()
            if tensor.layer == 1 and tensor.target
        }
        with peak:
            price(checkpoint, windows, specs, hessians=hessians, reduced_precision=True)
    with capsys.disabled():
        print(f"\npeak anonymous memory of pricing: {peak.nbytes / 1e9:.2f} GB, planned {needed / 1e9:.2f} GB")
    assert 0.3 * needed < peak.nbytes <= needed


@pytest.mark.parametrize(("reduced_precision", "passes", "a_spec"), [(False, 4, 1), (True, 1.5, 0.3)])
def test_the_planned_time_is_that_of_its_parts(reduced_precision, passes, a_spec, e4b, monkeypatch):
    """Multiplications of the passes and of `+gptq`, and weights that are quantized, at a picosecond each."""
    monkeypatch.setattr("epic_quant.plan._seconds_a_multiplication", lambda config, tokens: 1e-12)
    monkeypatch.setattr("epic_quant.plan._seconds_a_weight", lambda spec: 1e-7)
    specs = [WeightSpec.parse(text) for text in ("int4", "codebook3+had256+gptq", "codebook2+had256+gptq")]
    shapes = [t.shape for t in expected_tensors(e4b) if t.layer is not None and t.tensor_class and not t.unused]
    numel = sum(rows * cols for rows, cols in shapes) + 262144 * 2560
    compensated = sum(2 * rows * cols**2 + cols**3 / 2 for rows, cols in shapes)
    quantizing = 1e-7 * numel * 3 * (2 if reduced_precision else 1) + 1e-12 * compensated
    total = 1e-12 * 2048 * numel * (passes + 3 * a_spec) + quantizing
    said = plan_prices(e4b, specs, 2, 1024, reduced_precision)[0]
    assert said.endswith(f", about {total:,.0f} s, {quantizing:,.0f} s of it quantizing")


def test_rows_that_make_up_for_each_other_are_planned_for(e4b):
    """The errors of a matrix of 2560 by 10240; roots of four blocks of 2560² for gate and up each; and time as well."""
    gptq, yaqa = (WeightSpec.parse(f"int3-g128+{stage}") for stage in ("gptq", "yaqa"))
    one_sided, two_sided = (needed_nbytes(e4b, 2048, [spec], True)[0] for spec in (gptq, yaqa))
    least = 4 * 2560 * 10240 + 4 * 2 * 4 * 2560**2
    assert least < two_sided - one_sided < 5 * least


def test_factors_are_planned_for_where_errors_are_compensated(e4b):
    """One of E4B's down projection has 10240² weights of 4 bytes."""
    texts = ("codebook3+had256", "codebook3+had256+gptq", "codebook2+had256+gptq")
    plain, one, other = (WeightSpec.parse(text) for text in texts)
    without, _ = needed_nbytes(e4b, 2048, [plain, plain], True)
    shared, _ = needed_nbytes(e4b, 2048, [one, other], True)
    assert 5 * 4 * 10240**2 < shared - without < 10 * 4 * 10240**2
    assert shared < 8e9
