"""Hessians against those of the inputs that `transformers` itself computes."""

import argparse
import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from epic_quant.calibration import Hessians, gather, main
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, QuantizationError, TokenError
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.metrics import squared_output_norm
from epic_quant.plugin.run import SMALL_MODEL, Run
from epic_quant.prices import price
from epic_quant.prices.backward import Backward, Linear
from epic_quant.quant import quantize
from epic_quant.results.prices import write_prices
from epic_quant.spec import WeightSpec
from epic_quant.text import token_windows

MINI = Path(__file__).resolve().parents[1] / SMALL_MODEL

# Of the trained model: the globals, and layers of both kinds of attention.
FEW_LAYERS = (None, 0, 5, 11)

WINDOWS = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "calibration.txt"
    path.write_text("some text", encoding="utf-8")
    return path


@pytest.fixture
def hessians(toy_checkpoint, text, tmp_path):
    return gather(toy_checkpoint, text, WINDOWS, tmp_path / "hessians.safetensors")


def test_hessians_are_those_of_the_inputs_in_transformers(hessians, reference):
    """Every linear layer's input is caught by a hook in the other implementation."""
    model = reference("e4b", torch.float32)
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0]))
        for name, module in model.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    head = model.lm_head.register_forward_pre_hook(lambda _, args: seen.setdefault("embed_tokens", args[0]))
    model(input_ids=WINDOWS, use_cache=False)
    for hook in (*hooks, head):
        hook.remove()
    assert len(seen) > 60
    for name, x in seen.items():
        x = x.flatten(0, -2).double()
        expected = x.T @ x / len(x) if name != "embed_tokens" else x.square().mean(0)
        torch.testing.assert_close(hessians[f"{name}.weight"].read().double(), expected, rtol=1e-3, atol=1e-5)


def test_a_file_of_prices_has_the_diagonals_and_is_refused_for_error_compensation(hessians, toy_checkpoint, tmp_path):
    found = price(toy_checkpoint, WINDOWS, [WeightSpec("int8")], facts={"text_sha256": "some"})
    write_prices(found, tmp_path / "out.prices.safetensors")
    importance = Hessians(tmp_path / "out.prices.safetensors", toy_checkpoint)
    assert set(importance) >= set(hessians)
    for name in hessians:
        whole, cols = hessians[name].read(), importance[name].read().shape[0]
        expected = whole if whole.dim() == 1 else whole.diagonal()
        torch.testing.assert_close(importance[name].diagonal(cols), expected, rtol=1e-3, atol=1e-5)
    importance.check([WeightSpec.parse("q4_k+imatrix")])
    hessians.check([WeightSpec.parse("int4+gptq")])
    with pytest.raises(CheckpointError, match=r"int4.gptq needs Hessians, but .*out.prices.safetensors has prices"):
        importance.check([WeightSpec.parse("int4+gptq")])
    with pytest.raises(QuantizationError, match=r"gptq needs the Hessian .* and got its diagonal alone"):
        quantize(torch.ones(2, 48), WeightSpec("int4", gptq=True), importance["layers.0.mlp.up_proj.weight"])


@pytest.fixture
def with_outputs(toy_checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr("epic_quant.quant.gptq._OUTPUT_ROWS", 48)
    return gather(toy_checkpoint, text, WINDOWS, tmp_path / "outputs.safetensors", outputs=True)


def test_hessians_of_outputs_are_those_of_the_backward_pass(with_outputs, hessians, toy_checkpoint):
    """In blocks of at most 48 rows, for every weight its own; what the inputs' are is not changed."""
    shapes = set()
    for one in Backward(CheckpointWeights(toy_checkpoint), WINDOWS, seed=0).run():
        if isinstance(one, Linear):
            gradient = one.gradient.double()
            whole = gradient.T @ gradient / WINDOWS.numel()
            blocks = with_outputs[one.name].output.read().double()
            shapes.add(blocks.shape[:2])
            expected = whole * torch.block_diag(*torch.ones_like(blocks))
            torch.testing.assert_close(torch.block_diag(*blocks), expected, rtol=1e-4, atol=1e-4 * float(whole.max()))
            assert torch.equal(with_outputs[one.name].read(), hessians[one.name].read())
    assert {count for count, _ in shapes} > {1}
    assert all(size <= 48 for _, size in shapes)
    assert set(with_outputs) == set(hessians)
    assert len(with_outputs) == len(hessians)


def test_each_weight_has_its_own_outputs_and_shares_what_is_made_of_its_inputs(with_outputs):
    q, k = (with_outputs[f"layers.0.self_attn.{name}_proj.weight"] for name in "qk")
    assert q is with_outputs["layers.0.self_attn.q_proj.weight"]
    assert q.output is not k.output
    cols = q.read().shape[0]
    assert q.factor(cols, 0) is k.factor(cols, 0)


def test_a_file_without_outputs_is_refused_for_specs_that_need_them(with_outputs, hessians, tmp_path):
    specs = [WeightSpec.parse("int4+gptq"), WeightSpec.parse("int4+yaqa")]
    hessians.check(specs[:1])
    with_outputs.check(specs)
    with pytest.raises(CheckpointError, match=r"hessians.safetensors: lacks .*: python -m epic_quant.calibration --ou"):
        hessians.check(specs)


def test_the_output_error_from_hessians_is_that_of_the_inputs():
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 8, generator=rng).double(), torch.randn(3, 8, generator=rng)
    direct = (x @ weight.double().T).square().sum() / len(x)
    assert squared_output_norm(weight, x.T @ x / len(x)) == pytest.approx(float(direct), rel=1e-10)


@pytest.fixture(scope="module")
def mini_model(tmp_path_factory):
    """The trained model's weights, with Hessians of the calibration text and of the evaluation text."""
    with Checkpoint.open(MINI) as checkpoint:
        weights, folder = CheckpointWeights(checkpoint), tmp_path_factory.mktemp("hessians")
        paths = [MINI / name for name in ("calibration.txt", "eval.txt")]
        found = (
            gather(checkpoint, path, token_windows(checkpoint, path, 4, 256), folder / path.stem) for path in paths
        )
        yield weights, *found


@pytest.mark.parametrize("spec", ["q4_k", "q2_k"])
def test_an_importance_matrix_lowers_the_output_error_on_a_text_that_it_has_not_seen(mini_model, spec):
    weights, calibration, evaluation = mini_model
    plain, weighted = WeightSpec(spec), WeightSpec(spec, imatrix=True)
    errors: dict[str, dict[WeightSpec, float]] = {}
    for tensor in (one for one in weights.tensors.values() if one.layer in FEW_LAYERS and one.layer is not None):
        if tensor.name in calibration and not tensor.unused and plain.fits(tensor.shape[1]):
            weight = weights.get(tensor.name)
            of_class = errors.setdefault(tensor.tensor_class, {plain: 0.0, weighted: 0.0})
            for one in of_class:
                error = quantize(weight, one, calibration[tensor.name]).dequantize() - weight
                of_class[one] += squared_output_norm(error, evaluation[tensor.name].read())
    assert all(of_class[weighted] < of_class[plain] for of_class in errors.values())
    # The inputs of down_proj differ most in size.
    assert errors["mlp"][weighted] < 0.2 * errors["mlp"][plain]


def test_the_file_names_the_checkpoint_and_the_text(hessians, toy_checkpoint, text, tmp_path):
    assert hessians.text_sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert hessians.num_tokens == WINDOWS.numel()
    stored = load_file(tmp_path / "hessians.safetensors")
    assert set(stored) == set(hessians)
    assert len(stored) == len(hessians)
    assert all(torch.equal(hessians[name].read(), tensor) for name, tensor in stored.items())


def test_weights_with_one_input_share_their_hessians(hessians):
    q, k, v = (hessians[f"layers.0.self_attn.{name}_proj.weight"] for name in "qkv")
    assert q is k is v
    assert hessians["layers.0.mlp.gate_proj.weight"] is not q
    assert hessians["layers.1.self_attn.q_proj.weight"] is not q
    assert hessians["layers.0.self_attn.q_proj.weight"] is not q  # what was made for layer 0 is not kept
    assert "layers.0.mlp.up_proj.weight" in hessians
    assert "layers.0.mlp.nothing.weight" not in hessians
    with pytest.raises(KeyError):
        hessians["embed_tokens_per_layer.weight"]


def test_hessians_of_another_checkpoint_are_refused(hessians, toy, tmp_path):
    with Checkpoint.open(toy("no_sharing")) as other, pytest.raises(CheckpointError, match="hessians of checkpoint"):
        Hessians(tmp_path / "hessians.safetensors", other)


def test_a_file_that_holds_no_hessians_is_refused(toy_checkpoint, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a file of Hessians: it names no checkpoint"):
        Hessians(tmp_path / "other.safetensors", toy_checkpoint)
    with pytest.raises(CheckpointError, match="not a file of Hessians"):
        Hessians(tmp_path / "none.safetensors", toy_checkpoint)


def test_a_place_that_cannot_be_written_leaves_nothing(toy_checkpoint, text, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        gather(toy_checkpoint, text, WINDOWS, tmp_path / "none" / "hessians.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.txt"]


def test_the_command_line_says_what_is_wrong_in_one_line(toy, text, tmp_path, capsys):
    """The toy has no tokenizer."""
    assert main([str(toy("e4b")), "--text", str(text), "--out", str(tmp_path / "hessians")]) == 2
    error = capsys.readouterr().err
    assert "no tokenizer.json" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "hessians").exists()


def test_calibration_and_evaluation_texts_share_few_lines(pytestconfig):
    """Fewer than 1% of the lines of more than 60 bytes are in both files."""
    texts = [(pytestconfig.rootpath / SMALL_MODEL / name).read_bytes() for name in ("calibration.txt", "eval.txt")]
    assert hashlib.sha256(texts[0]).digest() != hashlib.sha256(texts[1]).digest()
    calibration, evaluation = ({line for line in text.split(b"\n") if len(line) > 60} for text in texts)
    assert len(calibration & evaluation) < 0.01 * len(evaluation)


def test_hessians_of_the_evaluation_text_are_refused(pytestconfig, tmp_path):
    """Hashes of the two texts are compared, whatever the files are called."""
    copy = tmp_path / "calibration.txt"
    copy.write_bytes((pytestconfig.rootpath / SMALL_MODEL / "eval.txt").read_bytes())
    run = Run(pytestconfig.option, pytestconfig.rootpath)
    run.options = argparse.Namespace(hessians=None, calibration_text=copy, text=None, price=[])
    with run.checkpoint, pytest.raises(TokenError, match="calibrated on the evaluation text"):
        run.hessians(tmp_path)
