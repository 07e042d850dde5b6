"""GGUF files as policies, beside gguf-py's own decoding."""

import math

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from epic_quant.errors import CheckpointError, ConfigError, EpicQuantError, SpecError
from epic_quant.export.__main__ import main as export
from epic_quant.footprint import resident
from epic_quant.plan import plan, plan_quality, plan_quantizing
from epic_quant.policy import PolicyWeights, check, opened, spec_of, tensor_nbytes
from epic_quant.published import open_published
from epic_quant.published.source import differences
from epic_quant.quality import evaluate
from epic_quant.quality.passes import quantized_numel
from epic_quant.quality.variants import Variant
from epic_quant.spec import FORMATS, PUBLISHED, PolicySpec

MIXED = "mlp=q4_k,mlp.down_proj@0-3=q6_k,sliding_attention=q5_k,full_attention=q3_k,ple_table=q4_0,embedding=q8_0"


def policy_of(path, name="theirs"):
    return PolicySpec.parse(f"{name}=file:{path}")


@pytest.fixture
def mixed(mini, gguf_of, tmp_path):
    """A policy of ours, and a file that holds the same."""
    ours = PolicySpec.parse(MIXED)
    return ours, gguf_of(PolicyWeights(mini, ours)).write(tmp_path / "model.gguf")


def test_a_file_of_our_own_blocks_has_our_policys_bytes_and_divergence(mini, plain, mixed, windows):
    ours, path = mixed
    theirs = opened(policy_of(path), plain.config)
    plain_parts = "ple_model_projection=f32,ple_projections=f32"
    assert theirs == PolicySpec.parse(f"file:{path},{MIXED},{plain_parts}")
    found = evaluate(mini, {"ours": ours, "theirs": theirs}, windows)
    assert found["theirs"] == found["ours"]
    assert found["ours"].kl_divergence > found["bf16"].kl_divergence == 0
    for tensor in plain.tensors.values():
        if tensor.target is not None and not tensor.unused and str(ours.spec_of(tensor.target)) != "bf16":
            assert tensor_nbytes(theirs, tensor) == tensor_nbytes(ours, tensor)
    assert resident(theirs, plain.config, 128)["mlp"] == resident(ours, plain.config, 128)["mlp"]


def test_the_plan_counts_what_is_decoded_of_a_file(mini, plain, mixed):
    """Every matrix that a pass multiplies by, whatever it is stored in; the same policy without a file quantizes."""
    ours, path = mixed
    theirs = opened(policy_of(path), plain.config)
    found = quantized_numel([Variant(theirs)], plain.config)
    own = quantized_numel([Variant(ours)], plain.config)
    assert {spec: numel for (spec, file), numel in found.items() if str(spec) != "f32"} == {
        spec: numel for (spec, _), numel in own.items()
    }
    used = [t for t in plain.tensors.values() if t.target is not None and not t.unused]
    multiplied = sum(math.prod(t.shape) for t in used if t.target.tensor_class != "ple_table")
    assert sum(found.values()) == multiplied
    lines = plan_quality("quality", plain.config, {"theirs": theirs}, 1, 16, 10**9)
    assert any(line.startswith(f"  decoding published files: {multiplied / 1e6:,.1f} M weights, ") for line in lines)
    assert not any("quantizing" in line for line in lines)
    assert [line.split(":")[0] for line in plan(plain.config, [theirs], 4)[1:-2]] == [
        f"  {spec} in {path}" for spec in sorted({str(spec_of(theirs, t)) for t in used})
    ]
    assert plan_quantizing(plain.config, [theirs], {0}) > 0 == plan_quantizing(plain.config, [PolicySpec("bf16")], {0})


KINDS = [Type.Q8_0, Type.Q4_1, Type.Q5_1, Type.MXFP4, Type.F16, Type.BF16]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_matrices_are_what_gguf_py_decodes_bit_for_bit(kind, plain, gguf_of, tmp_path):
    file = gguf_of(plain, lambda tensor: kind if tensor.target is not None else Type.F32)
    weights = weights_of_file(file.write(tmp_path / "model.gguf"), plain)
    for name in ("layers.0.mlp.up_proj.weight", "layers.5.self_attn.o_proj.weight", "embed_tokens_per_layer.weight"):
        array, _ = file.tensors[name]
        expected = torch.from_numpy(gguf.dequantize(array, kind).astype(np.float32))
        stored = weights.get(name)
        decoded = stored.float() if isinstance(stored, Tensor) else stored.dequantize()
        assert torch.equal(decoded, expected)
        ids = torch.tensor([3, 0, 3])
        assert torch.equal(weights.rows(name, ids).float(), expected[ids])
        assert weights.nbytes(name) == array.nbytes
        assert str(weights.file.tensors[name].spec) == kind.name.lower()


def weights_of_file(path, plain):
    from epic_quant.published import PublishedWeights

    return PublishedWeights(open_published(str(path)), plain.config)


@pytest.mark.parametrize("name", [name for name, info in PUBLISHED.items() if info.module == "ggml"])
def test_random_blocks_of_every_other_type_decode_as_gguf_py_does(name, plain, gguf_of, tmp_path):
    size, nbytes = gguf.GGML_QUANT_SIZES[Type[name.upper()]]
    assert (PUBLISHED[name].block_size, PUBLISHED[name].block_nbytes) == (size, nbytes)
    file, tensor = gguf_of(plain), "layers.0.mlp.up_proj.weight"
    rows, cols = plain.tensors[tensor].shape
    blocks = np.random.default_rng(0).integers(0, 48, (rows, cols // size * nbytes), dtype=np.uint8)
    file.tensors[tensor] = blocks, Type[name.upper()]
    stored = weights_of_file(file.write(tmp_path / "model.gguf"), plain).get(tensor)
    expected = torch.from_numpy(gguf.dequantize(blocks, Type[name.upper()]))
    assert expected.isfinite().all()
    assert torch.equal(stored.dequantize(), expected)
    x = torch.ones(2, cols, dtype=torch.float64)
    torch.testing.assert_close(stored.matmul(x), x @ expected.double().T)
    assert stored.nbytes == blocks.nbytes


def test_every_type_that_gguf_py_decodes_is_known():
    decoded = {kind.name.lower() for kind in gguf.quants._type_traits}
    assert decoded <= {*FORMATS, *PUBLISHED}


def test_a_split_file_is_read_whole_from_any_of_its_parts(plain, gguf_of, tmp_path):
    gguf_of(plain).write(tmp_path / "model.gguf", shards=40)
    parts = sorted(tmp_path.glob("model-*-of-*.gguf"))
    assert len(parts) > 2
    for part in (parts[0], parts[-1]):
        weights = weights_of_file(part, plain)
        assert {name for name, tensor in plain.tensors.items() if not tensor.unused} == set(weights.tensors)
    assert PolicySpec.parse(f"file:{parts[1]}").name == "model"
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=rf"{parts[1].name}: this part is missing"):
        open_published(str(parts[2]))
    parts[0].rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="expected a name that ends with -0000N-of-"):
        open_published(str(tmp_path / "other.gguf"))


def test_a_file_from_another_checkpoint_is_told_by_its_norms(plain, gguf_of, tmp_path):
    file = gguf_of(plain)
    same = differences(weights_of_file(file.write(tmp_path / "same.gguf"), plain), plain)
    assert not any("another checkpoint" in line for line in same)
    norm, kind = file.tensors["layers.3.input_layernorm.weight"]
    file.tensors["layers.3.input_layernorm.weight"] = norm * np.float32(1.01), kind
    file.extra["v.patch_embd.weight"] = np.ones(8, dtype=np.float32)
    lines = differences(weights_of_file(file.write(tmp_path / "other.gguf"), plain), plain)
    assert "1 of " in lines[0]
    assert "made from another checkpoint" in lines[0]
    assert "layers.3.input_layernorm.weight" in lines[0]
    assert any("v.patch_embd.weight" in line for line in lines)


# What the small model's config says, by hand, as gguf-py writes it: one number may stand for all layers.
SAME = {
    "block_count": 18, "layer_norm_rms_eps": 1e-6, "rope_freq_base": 1e6, "rope_freq_base_swa": 1e4,
    "head_count": [4] * 18, "head_count_kv": 2, "feed_forward_length": [512] * 18, "sliding_window": 64,
    "sliding_window_pattern": ([True] * 5 + [False]) * 3, "final_logit_softcapping": 30.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"block_count": 17}, "block_count 17, not 18"),
        ({"layer_norm_rms_eps": 1e-5}, "attention.layer_norm_rms_epsilon 9.99"),
        ({"rope_freq_base": 5e5}, "rope.freq_base 500000.0, not 1000000.0"),
        (
            {"rope_freq_base_swa": float("nan"), "sliding_window": 512},
            "attention.sliding_window 512, not 64; rope.freq_base_swa nan, not 10000.0)",
        ),
        ({"head_count": [4] * 17 + [8]}, "attention.head_count[17] 8, not 4)"),
        ({"head_count_kv": [2] * 17}, "attention.head_count_kv of 17 values, not 18)"),
        ({"sliding_window_pattern": [True] * 18}, "attention.sliding_window_pattern[5] True, not False)"),
        ({"final_logit_softcapping": 50.0}, "final_logit_softcapping 50.0, not 30.0"),
    ],
)
def test_metadata_that_is_otherwise_than_the_config_is_told_by_its_keys(changes, told, plain, gguf_of, tmp_path):
    file = gguf_of(plain)
    file.metadata = SAME | changes
    lines = differences(weights_of_file(file.write(tmp_path / "model.gguf"), plain), plain)
    stated = [line for line in lines if "states another model" in line]
    if told is None:
        assert not stated
    else:
        assert f"({told}" in stated[0]


@pytest.mark.parametrize(
    ("factors", "told"),
    [
        ([1.0] * 16 + [1e30] * 48, None),
        ([1.0] * 17 + [1e30] * 47, "rope_freqs.weight[16] 1.0, not 1e+30"),
        ([2.0] * 16 + [1e30] * 48, "rope_freqs.weight[0] 2.0, not 1.0"),
        ([1.0] * 16, "rope_freqs.weight of 16 values, not 64"),
    ],
)
def test_other_factors_of_rope_are_told(factors, told, plain, gguf_of, tmp_path):
    """A quarter of the 64 pairs of a full layer's head rotate."""
    file = gguf_of(plain)
    file.extra["rope_freqs.weight"] = np.array(factors, dtype=np.float32)
    lines = differences(weights_of_file(file.write(tmp_path / "model.gguf"), plain), plain)
    assert [f"({told})" in line for line in lines] == ([] if told is None else [True])


@pytest.mark.parametrize("file_format", ["gguf", "compressed-tensors", "gemma"])
def test_what_export_writes_states_the_checkpoints_model(file_format, mini, plain, tmp_path):
    policy = "mlp=q8_0" if file_format == "gguf" else "mlp=int8"
    assert export([mini.source, "--policy", policy, "--format", file_format, str(tmp_path / "out")]) == 0
    weights = weights_of_file(tmp_path / "out", plain)
    assert weights.file.metadata["rope.freq_base"] == 1e6
    assert not any("another" in line for line in differences(weights, plain))


def test_a_file_does_not_change_what_the_reference_is(mini, plain, gguf_of, tmp_path, windows):
    """Its norms are its own: the reference, and a policy beside it, keep the checkpoint's."""
    file = gguf_of(plain)
    alone = evaluate(mini, {"int4": PolicySpec.parse("mlp=int4")}, windows)
    exact = policy_of(file.write(tmp_path / "exact.gguf"), "exact")
    norm, kind = file.tensors["norm.weight"]
    file.tensors["norm.weight"] = norm * np.float32(1.5), kind
    scaled = policy_of(file.write(tmp_path / "scaled.gguf"), "scaled")
    found = evaluate(mini, {"int4": PolicySpec.parse("mlp=int4"), "exact": exact, "scaled": scaled}, windows)
    assert found["int4"] == alone["int4"]
    assert found["exact"].kl_divergence == 0
    assert found["scaled"].kl_divergence > 0


@pytest.mark.parametrize("cut", [3, 20, 300, 5000, -40])
def test_a_truncated_file_is_one_line(cut, plain, gguf_of, tmp_path):
    path = gguf_of(plain).write(tmp_path / "model.gguf")
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with pytest.raises(CheckpointError, match=r"truncated|not a GGUF") as raised:
        open_published(str(path))
    assert "\n" not in str(raised.value)


def damaged(file, change):
    if change == "architecture":
        file.architecture = "llama"
    elif change == "head":
        file.extra["output.weight"] = np.zeros((4, 256), dtype=np.float32)
    elif change == "experts":
        file.extra["blk.0.ffn_gate_inp.weight"] = np.zeros((4, 256), dtype=np.float32)
    elif change == "missing":
        del file.tensors["layers.2.mlp.up_proj.weight"]
    elif change == "shape":
        file.tensors["layers.2.mlp.up_proj.weight"] = np.zeros((4, 256), dtype=np.float32), Type.F32
    elif change == "layers":
        file.extra["blk.40.attn_norm.weight"] = np.zeros(256, dtype=np.float32)
    elif change == "type":
        file.tensors["layers.2.mlp.up_proj.weight"] = np.zeros((512, 40 * 8), dtype=np.uint8), Type.Q8_1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("architecture", CheckpointError, r"its architecture is 'llama'; expected gemma4"),
        ("head", CheckpointError, "a head of its own"),
        ("experts", CheckpointError, r"blk\.0\.ffn_gate_inp\.weight is no tensor of a dense"),
        ("missing", CheckpointError, r"no tensor layers\.2\.mlp\.up_proj\.weight"),
        ("shape", ConfigError, r"layers\.2\.mlp\.up_proj\.weight is \[4, 256\], the checkpoint's \[512, 256\]"),
        ("layers", ConfigError, r"layers\.40\.input_layernorm\.weight, which the checkpoint has not"),
        ("type", CheckpointError, r"unknown ggml type 'q8_1'; did you mean"),
    ],
)
def test_what_is_no_file_of_this_model_is_refused(change, error, message, plain, gguf_of, tmp_path):
    file = gguf_of(plain)
    damaged(file, change)
    path = file.write(tmp_path / "model.gguf")
    with pytest.raises(error, match=message):
        check(policy_of(path), plain.config)


def test_a_policy_that_says_something_else_of_its_file_is_refused(plain, mixed):
    path = mixed[1]
    with pytest.raises(SpecError, match="does not hold what this policy says"):
        check(PolicySpec.parse(f"file:{path},mlp=q2_k"), plain.config)
    check(opened(policy_of(path), plain.config), plain.config)


@pytest.mark.parametrize("file_format", ["gguf", "compressed-tensors"])
def test_any_changed_byte_makes_another_fingerprint_and_another_name_none(file_format, mini, tmp_path):
    policy = "mlp=q8_0" if file_format == "gguf" else "mlp=int8"
    out = tmp_path / "out"
    assert export([mini.source, "--policy", policy, "--format", file_format, str(out)]) == 0
    file = out if file_format == "gguf" else out / "model.safetensors"
    before = open_published(str(out)).fingerprint
    moved = out.rename(tmp_path / "moved")
    assert open_published(str(moved)).fingerprint == before
    file = tmp_path / "moved" / file.relative_to(out)
    for at in np.random.default_rng(0).integers(file.stat().st_size // 2, file.stat().st_size, 3):
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)
        assert open_published(str(moved)).fingerprint not in (before, None)
        before = open_published(str(moved)).fingerprint


def test_a_changed_file_is_read_anew_and_is_another_variant(plain, gguf_of, tmp_path):
    file, path = gguf_of(plain), tmp_path / "model.gguf"
    before = str(Variant(policy_of(file.write(path))))
    path.unlink()
    norm, kind = file.tensors["norm.weight"]
    file.tensors["norm.weight"] = norm * np.float32(2), kind
    assert str(Variant(policy_of(file.write(path)))) != before


@pytest.mark.parametrize("content", [b"", b"GGUF", b"hello world"])
def test_what_is_no_published_file_is_refused(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(EpicQuantError, match=r"^\S+/x: "):
        open_published(str(tmp_path / "x"))
    with pytest.raises(EpicQuantError, match="nowhere"):
        open_published(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "value", [b"\x08\0\0\0" + (1).to_bytes(8, "little") + b"3", b"\x09\0\0\0\x04\0\0\0" + bytes(8)]
)
def test_a_number_of_parts_that_is_no_number_is_refused(value, tmp_path):
    key = b"split.count"
    head = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
    (tmp_path / "model.gguf").write_bytes(head + len(key).to_bytes(8, "little") + key + value)
    with pytest.raises(CheckpointError, match=r"split\.count; expected a number"):
        open_published(str(tmp_path / "model.gguf"))


def test_two_tensors_in_one_place_are_refused(plain, gguf_of, tmp_path):
    path = gguf_of(plain).write(tmp_path / "model.gguf")
    data = bytearray(path.read_bytes())
    infos = [data.index(name) + len(name) for name in (b"blk.2.ffn_up.weight", b"blk.3.ffn_up.weight")]
    # Behind the name: the number of dims, two dims, the type, and the offset.
    (first, second) = (slice(at + 24, at + 32) for at in infos)
    data[second] = data[first]
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"blk\.3\.ffn_up\.weight begins in blk\.2\.ffn_up\.weight, before byte"):
        open_published(str(path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.1.mlp.gate_proj.weight", "norm.weight"])
def test_a_scale_or_norm_that_is_not_finite_is_refused_by_name(name, value, mini, plain, gguf_of, windows, tmp_path):
    file = gguf_of(plain, lambda tensor: Type.Q8_0 if tensor.target is not None else Type.F32)
    array, kind = file.tensors[name]
    array, row = array.copy(), 0
    if kind == Type.Q8_0:
        row = len(array) - 3  # of the embedding, of a token that is not in the window: the head has it
        array[row, :2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    else:
        array[5] = value
    file.tensors[name] = array, kind
    policy = policy_of(file.write(tmp_path / "model.gguf"))
    with pytest.raises(CheckpointError, match=f"model.gguf: {name} has NaN or infinity in row {row}$"):
        evaluate(mini, {"theirs": policy}, windows)
