"""GGUF files: read back through gguf-py, against the checkpoint's own tensors, tokenizer and config."""

import json

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from epic_quant.export.__main__ import main
from epic_quant.gemma4.rope import inverse_frequencies
from epic_quant.policy import PolicyWeights
from epic_quant.quant import StoredMatrix
from epic_quant.spec import FORMATS, PolicySpec

from .conftest import MINI

# Every type of ggml, on matrices whose rows are whole blocks of it.
POLICY = (
    "sliding_attention=q4_k,sliding_attention.q_proj=q5_k,sliding_attention@2-3=tq2_0,sliding_attention@4=tq1_0,"
    "full_attention=q6_k,full_attention@5=iq4_nl,mlp=q3_k,mlp.down_proj=q2_k,mlp.down_proj@6=int4-g32,"
    "mlp.down_proj@7=int5-g32,mlp.down_proj@8=int8-g32,ple_projections=q8_0,"
    "ple_projections.per_layer_input_gate=q4_0,ple_table=q5_0,kv=int8,ple=lru:100"
)


ROPE = "rope_freqs.weight"
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, 18)


def to_gguf(tensor):
    return NAMES.get_name(f"model.{tensor.name.removesuffix('.weight')}") + ".weight"


@pytest.fixture(scope="module")
def written(export):
    return gguf.GGUFReader(export("gguf", POLICY))


@pytest.fixture(scope="module")
def fields(written):
    return {name: field.contents() for name, field in written.fields.items()}


def test_every_tensor_is_what_the_policy_stores_bit_for_bit(written, mini):
    weights = PolicyWeights(mini, PolicySpec.parse(POLICY))
    found = {tensor.name: tensor for tensor in written.tensors}
    used = [tensor for tensor in weights.tensors.values() if not tensor.unused]
    assert found.keys() == {to_gguf(tensor) for tensor in used} | {ROPE}
    types = set()
    for tensor in used:
        theirs, ours = found[to_gguf(tensor)], weights.get(tensor.name)
        types.add(theirs.tensor_type.name.lower())
        assert tuple(theirs.shape[::-1]) == tensor.shape
        if isinstance(ours, StoredMatrix):
            assert theirs.tensor_type.name.lower() == ours.spec.ggml_type
            ours = ours.dequantize()
        decoded = gguf.quants.dequantize(theirs.data, theirs.tensor_type).reshape(tensor.shape)
        np.testing.assert_array_equal(decoded.view(np.uint32), ours.float().numpy().view(np.uint32))
    assert types == {name for name, info in FORMATS.items() if info.block_nbytes} | {"f32", "bf16"}


def test_the_keys_are_those_of_the_config(fields):
    # benchmarks/mini_gemma4/config.json, by hand.
    expected = {
        "block_count": 18, "context_length": 2048, "embedding_length": 256, "feed_forward_length": 512,
        "embedding_length_per_layer_input": 32, "final_logit_softcapping": 30.0, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "attention.key_length": 128, "attention.value_length": 128, "attention.key_length_swa": 64,
        "attention.value_length_swa": 64, "attention.shared_kv_layers": 6, "attention.sliding_window": 64,
        "attention.sliding_window_pattern": ([True] * 5 + [False]) * 3, "rope.dimension_count": 128,
        "rope.dimension_count_swa": 64, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4,
    }  # fmt: skip
    prefix = "gemma4."
    assert {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)} == expected
    assert fields["general.architecture"] == "gemma4"
    weights = PolicySpec.parse(POLICY.partition(",kv=")[0])
    assert PolicySpec.parse(fields["epic_quant.policy"]) == weights


def test_the_frequencies_over_the_factors_are_the_models(written, mini):
    weights = PolicyWeights(mini, PolicySpec.parse(POLICY))
    attention = weights.config.layers[-1].attention
    factors = next(tensor.data for tensor in written.tensors if tensor.name == ROPE)
    frequencies = 1e6 ** -(np.arange(64) / 64) / factors
    np.testing.assert_allclose(frequencies, inverse_frequencies(attention).numpy(), rtol=1e-6, atol=1e-29)


def test_the_tokenizer_is_the_checkpoints(fields):
    tokenizer = Tokenizer.from_file(str(MINI / "tokenizer.json"))
    assert fields["tokenizer.ggml.tokens"] == [tokenizer.id_to_token(number) for number in range(2048)]
    types = fields["tokenizer.ggml.token_type"]
    assert types[:5] == [gguf.TokenType.CONTROL] * 5
    assert types[5:261] == [gguf.TokenType.BYTE] * 256
    assert set(types[261:]) == {gguf.TokenType.NORMAL}
    assert len(fields["tokenizer.ggml.merges"]) == 1659
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")}
    assert ids == {"bos": 2, "eos": 1, "unknown": 3, "padding": 0}
    assert fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.ggml.model"] == "gemma4"


@pytest.fixture
def tokenizer(tmp_path):
    """`tokenizer(change)`: the small model's tokenizer.json, changed, in a place of its own."""

    def made(change):
        content = json.loads((MINI / "tokenizer.json").read_text(encoding="utf-8"))
        change(content)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return made


def test_rows_without_a_token_are_unused_ones(tokenizer, export):
    def without_the_last(content):
        content["model"]["merges"].pop()
        last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
        del content["model"]["vocab"][last]

    out = export("gguf", "bf16", "--tokenizer", str(tokenizer(without_the_last)))
    fields = gguf.GGUFReader(out).fields
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD2047]"
    assert fields["tokenizer.ggml.token_type"].contents()[-2:] == [gguf.TokenType.NORMAL, gguf.TokenType.UNUSED]


def test_a_template_that_is_no_unicode_is_refused_in_one_line(tokenizer, tmp_path, capsys):
    place = tokenizer(lambda content: None)
    place.with_name("tokenizer_config.json").write_text('{"chat_template": "\\ud800"}', encoding="utf-8")
    arguments = ["--policy", "bf16", "--format", "gguf", str(tmp_path / "out"), "--tokenizer", str(place)]
    assert main([str(MINI), *arguments]) == 2
    assert "tokenizer.json: a text in it, or in what is beside it, has half a surrogate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def more(content):
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 2048, "content": "more"})


CHANGES = {
    "more": (more, "'more' is token 2048, but the model has 2048"),
    "no merges": (lambda content: content["model"].update(merges=[]), "not of Gemma's kind, which llama.cpp reads"),
    "no bytes": (lambda content: content["model"].update(byte_fallback=False), "not of Gemma's kind"),
    "no type": (lambda content: content["model"].pop("type"), "not of Gemma's kind"),
    "bytes not named": (lambda content: content["model"].pop("byte_fallback"), "not of Gemma's kind"),
    "spaces": (lambda content: content.update(normalizer=None), "not of Gemma's kind"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(change, message, tokenizer, tmp_path, capsys):
    place = str(tokenizer(change))
    arguments = ["--policy", "bf16", "--format", "gguf", str(tmp_path / "out"), "--tokenizer", place]
    assert main([str(MINI), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
