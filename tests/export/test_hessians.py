"""Error compensation reaches a file."""

import gguf
import numpy as np
import torch

from epic_quant.calibration import gather
from epic_quant.export.__main__ import main
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.policy import PolicyWeights
from epic_quant.prices import price
from epic_quant.quant import quantize
from epic_quant.results.prices import write_prices
from epic_quant.spec import PolicySpec, WeightSpec

from .conftest import MINI


def test_importance_of_prices_reaches_a_file_and_error_compensation_is_refused(mini, tmp_path, capsys):
    windows = torch.arange(300, 332).view(2, 16)
    prices = price(mini, windows, [WeightSpec.parse("q4_k")], facts={"text_sha256": "some"})
    write_prices(prices, tmp_path / "out.prices.safetensors")
    out = str(tmp_path / "out.gguf")
    options = ["--format", "gguf", "--hessians", str(tmp_path / "out.prices.safetensors")]
    assert main([str(MINI), "--policy", "mlp.down_proj@0=int4-g32+gptq", *options, out]) == 2
    assert "make Hessians with: python -m epic_quant.calibration" in capsys.readouterr().err
    names = {"blk.0.ffn_down.weight": "layers.0.mlp.down_proj.weight", "token_embd.weight": "embed_tokens.weight"}
    policy = "mlp.down_proj@0=q4_k+imatrix,embedding=q4_k+imatrix"
    assert main([str(MINI), "--policy", policy, *options, out]) == 0
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    for name, ours in names.items():
        weight, hessian = CheckpointWeights(mini).get(ours), torch.diag(torch.from_numpy(prices.importance[ours]))
        expected = quantize(weight, WeightSpec.parse("q4_k+imatrix"), hessian).tensors()["blocks"]
        np.testing.assert_array_equal(tensors[name].data, expected.numpy())
        assert not torch.equal(quantize(weight, WeightSpec("q4_k")).tensors()["blocks"], expected)


def test_a_file_without_what_compensates_rows_is_refused(mini, tmp_path, capsys):
    gather(mini, MINI / "calibration.txt", torch.arange(300, 304).view(1, 4), tmp_path / "hessians")
    options = ["--policy", "mlp.up_proj@0=int4-g32+yaqa", "--format", "gguf", "--hessians", str(tmp_path / "hessians")]
    assert main([str(MINI), *options, str(tmp_path / "out.gguf")]) == 2
    error = capsys.readouterr().err
    assert "lacks the Hessians of outputs, which +yaqa needs; make it with: python -m epic_quant.calibration" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.gguf").exists()


def test_compensated_integers_are_a_type_of_ggml(mini, tmp_path):
    hessians = gather(mini, MINI / "calibration.txt", torch.arange(300, 556).view(2, 128), tmp_path / "hessians")
    policy = "mlp.up_proj@0=int4-g32+gptq"
    options = ["--policy", policy, "--format", "gguf", "--hessians", str(tmp_path / "hessians")]
    assert main([str(MINI), *options, str(tmp_path / "out.gguf")]) == 0
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    found = tensors["blk.0.ffn_up.weight"]
    ours = PolicyWeights(mini, PolicySpec.parse(policy), hessians).get("layers.0.mlp.up_proj.weight").dequantize()
    assert found.tensor_type.name == "Q4_0"
    decoded = gguf.quants.dequantize(found.data, found.tensor_type)
    np.testing.assert_array_equal(decoded.view(np.uint32), ours.numpy().view(np.uint32))
    plain = PolicyWeights(mini, PolicySpec.parse("mlp.up_proj@0=int4-g32")).get("layers.0.mlp.up_proj.weight")
    assert not torch.equal(plain.dequantize(), ours)
