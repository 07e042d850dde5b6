"""llama.cpp itself runs the files: `pip install -c constraints.txt -e '.[ggml]'`, and `-m slow`."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers

from epic_quant.checkpoint import Checkpoint
from epic_quant.export.__main__ import main
from epic_quant.gemma4.model import TextModel
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.policy import PolicyWeights
from epic_quant.spec import PolicySpec

from .conftest import MINI
from .test_gguf import POLICY

pytestmark = pytest.mark.slow
llama_cpp = pytest.importorskip("llama_cpp", reason="needs the extra ggml, which builds llama.cpp")

TABLES = "embedding=q4_k,ple_table=q5_0,ple_model_projection=q5_0"


@pytest.fixture
def toy_in_fp32(toy, tmp_path):
    """A toy by its name with weights in fp32, so that nothing rounds what multiplies them, and a tokenizer of names."""

    def made(name):
        shutil.copyfile(toy(name) / "config.json", tmp_path / "config.json")
        tensors = load_file(toy(name) / "model.safetensors")
        save_file({key: tensor.float() for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
        vocab = {
            {0: "a", 1: "b", 2: "<bos>", 3: "ab"}.get(number, f"<0x{number:02X}>"): number for number in range(120)
        }
        tokenizer = Tokenizer(models.BPE(vocab, [("a", "b")], byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    return made


@pytest.mark.parametrize("name", ["e4b", "e2b", "no_ple", "no_sharing", "other_rope"])
def test_llama_cpp_computes_what_models_of_the_architecture_differ_in(name, toy_in_fp32):
    folder = toy_in_fp32(name)
    assert main([str(folder), "--policy", "bf16", "--format", "gguf", str(folder / "out.gguf")]) == 0
    ids = torch.arange(40).remainder(117).add(3).tolist()
    fp32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(str(folder / "out.gguf"), n_ctx=64, logits_all=True, n_threads=1, verbose=False, **fp32)
    model.eval(ids)
    theirs = torch.from_numpy(np.array(model.scores[: len(ids)]))
    with Checkpoint.open(folder) as checkpoint:
        ours = TextModel(CheckpointWeights(checkpoint)).logits(torch.tensor([ids]))[0]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.05)  # its GELU is a table of fp16


def divergence(logits, other):
    """The mean KL divergence of two [tokens, vocab], in nats."""
    logs, others = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    return (logs.exp() * (logs - others)).sum(-1).mean().item()


# llama.cpp rounds K and V to fp16, and what multiplies a quantized matrix to 8 bits in blocks of 32 or 256.
@pytest.mark.parametrize(
    ("policy", "most", "caused"),
    [("bf16", 3e-5, 0), (f"mlp=q8_0,{TABLES}", 3e-4, 1e-4), (POLICY, 1e-3, 1e-2), ("mlp=tq2_0", 1e-3, 1e-1)],
    ids=["plain", "tables", "all types", "ternary"],
)
def test_llama_cpp_computes_the_logits_that_the_policy_has_here(policy, most, caused, export, mini):
    model = llama_cpp.Llama(str(export("gguf", policy)), n_ctx=512, logits_all=True, n_threads=1, verbose=False)
    text = (MINI / "eval.txt").read_text(encoding="utf-8")[:1000]
    ids = model.tokenize(text.encode(), add_bos=True)
    assert ids == Tokenizer.from_file(str(MINI / "tokenizer.json")).encode(text).ids
    ids = ids[:64]
    model.eval(ids)
    theirs = torch.from_numpy(np.array(model.scores[: len(ids)]))

    def ours(policy):
        return TextModel(PolicyWeights(mini, PolicySpec.parse(policy))).logits(torch.tensor([ids]))[0]

    weights = policy.partition(",kv=")[0]
    assert divergence(ours(weights), theirs) <= most
    assert divergence(ours("bf16"), theirs) >= caused  # so it has the policy's weights, and no others
