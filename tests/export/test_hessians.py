"""Error compensation reaches a file."""

import gguf
import numpy as np
import torch

from epic_quant.calibration import gather
from epic_quant.export.__main__ import main
from epic_quant.policy import PolicyWeights
from epic_quant.spec import PolicySpec

from .conftest import MINI


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
