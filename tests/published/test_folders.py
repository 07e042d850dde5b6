"""Folders in compressed-tensors and MLX's format as policies, packed by NumPy from the formats' definitions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear

from epic_quant.errors import CheckpointError, ConfigError
from epic_quant.plugin.run import SMALL_MODEL
from epic_quant.policy import PolicyWeights, check, opened, tensor_nbytes
from epic_quant.published import PublishedWeights, open_published
from epic_quant.published.source import differences
from epic_quant.quality import evaluate
from epic_quant.spec import PolicySpec

MINI = Path(__file__).resolve().parents[2] / SMALL_MODEL

NAME = "layers.1.mlp.up_proj"
GROUP = 32


def pack(codes, bits, across=True):
    """Codes [rows, n] into words: bit by bit from the lowest; or as many whole codes as a word holds."""
    per_word = 32 // bits
    bits_of = (codes[:, :, None].astype(np.uint64) >> np.arange(bits, dtype=np.uint64) & 1).astype(np.uint8)
    if not across:
        padded = np.pad(bits_of, ((0, 0), (0, -codes.shape[1] % per_word), (0, 0)))
        words = padded.reshape(len(codes), -1, per_word * bits)
        bits_of = np.pad(words, ((0, 0), (0, 0), (0, 32 - per_word * bits)))
    flat = bits_of.reshape(len(codes), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return np.packbits(flat, axis=1, bitorder="little").view("<u4")


def drawn(rows, cols, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, cols))


class Folder:
    """A folder of the small model whose matrices may be replaced by other parts."""

    def __init__(self, plain, config):
        self.tensors = {f"model.{name}": plain.get(name) for name, one in plain.tensors.items() if not one.unused}
        self.config = json.loads((MINI / "config.json").read_text(encoding="utf-8")) | config

    def replace(self, name, parts):
        del self.tensors[f"model.{name}.weight"]
        for part, values in parts.items():
            tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
            self.tensors[f"model.{name}.{part}"] = tensor.contiguous()

    def write(self, folder):
        folder.mkdir(exist_ok=True)
        save_file(self.tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        return folder


def compressed(plain, *widths, **options):
    groups = {f"group_{bits}": {"targets": ["Linear"], "weights": {"num_bits": bits}} for bits in widths}
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups} | options
    return Folder(plain, {"quantization_config": method})


def weights_of(folder, plain):
    return PublishedWeights(open_published(str(folder)), plain.config)


@pytest.fixture
def shape(plain):
    return plain.tensors[f"{NAME}.weight"].shape


def assert_decodes(folder, plain, expected, spec):
    weights, name = weights_of(folder, plain), f"{NAME}.weight"
    stored = weights.get(name)
    torch.testing.assert_close(stored.dequantize(), torch.from_numpy(expected).float(), rtol=1e-6, atol=0)
    ids = torch.tensor([7, 0, 7])
    assert torch.equal(weights.rows(name, ids), stored.dequantize()[ids])
    assert str(stored.spec) == spec


@pytest.mark.parametrize(
    ("bits", "across"), [*((bits, True) for bits in range(2, 9)), (3, False), (5, False), (6, False)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_codes_decode_as_defined(bits, symmetric, across, plain, shape, tmp_path):
    rows, cols = shape
    codes, zeros = drawn(rows, cols, bits), drawn(rows, cols // GROUP, bits, 1)
    scale = torch.rand(rows, cols // GROUP).bfloat16()
    folder = compressed(plain, bits)
    parts = {"weight_packed": pack(codes, bits, across).view(np.int32), "weight_scale": scale}
    parts["weight_shape"] = np.array(shape, dtype=np.int64)
    if symmetric:
        zeros = np.full_like(zeros, 1 << bits - 1)
    else:
        parts["weight_zero_point"] = pack(zeros.T, bits, across).T.view(np.int32)
    folder.replace(NAME, parts)
    grouped = codes.reshape(rows, -1, GROUP).astype(np.float64) - zeros[:, :, None]
    expected = (grouped * scale.double().numpy()[:, :, None]).reshape(rows, cols)
    folder = folder.write(tmp_path / "model")
    assert_decodes(folder, plain, expected, f"ct_{'' if symmetric else 'u'}int{bits}-g{GROUP}")
    nbytes = sum(torch.as_tensor(np.asarray(part)).nbytes for key, part in parts.items() if key != "weight_scale")
    assert weights_of(folder, plain).nbytes(f"{NAME}.weight") == nbytes + scale.nbytes


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("scale_shape", [(1,), (512, 1), (512,), (512, 8)])
def test_unpacked_codes_decode_as_defined(dtype, scale_shape, plain, shape, tmp_path):
    rows, _ = shape
    weight = (torch.rand(shape) * 200 - 100).to(dtype)
    scale = torch.rand(scale_shape)
    folder = compressed(plain, 8, format="naive-quantized")
    folder.replace(NAME, {"weight": weight, "weight_scale": scale, "input_scale": torch.ones(1)})
    by_row = scale.double().reshape(1, 1).expand(rows, 1) if scale.numel() == 1 else scale.double().reshape(rows, -1)
    expected = weight.double().view(rows, by_row.shape[1], -1) * by_row.unsqueeze(2)
    group = "" if by_row.shape[1] == 1 else "-g32"
    name = "ct_int8" if dtype is torch.int8 else "ct_float8"
    assert_decodes(folder.write(tmp_path / "model"), plain, expected.view(shape).numpy(), name + group)


@pytest.mark.parametrize("block", [(128, 128), (100, 96), (256, 32)])
def test_float8_codes_of_blocks_decode_as_defined(block, plain, shape, tmp_path):
    weight, counts = (torch.rand(shape) * 200 - 100).to(torch.float8_e4m3fn), -(-np.array(shape) // block)
    scale = torch.rand(tuple(counts)).bfloat16()
    folder = compressed(plain, 8, format="float-quantized")
    scheme = folder.config["quantization_config"]["config_groups"]["group_8"]["weights"]
    scheme |= {"type": "float", "strategy": "block", "block_structure": block}
    folder.replace(NAME, {"weight": weight, "weight_scale": scale})
    by_weight = np.kron(scale.double().numpy(), np.ones(block))[: shape[0], : shape[1]]
    path = folder.write(tmp_path / "model")
    assert_decodes(path, plain, weight.double().numpy() * by_weight, f"ct_float8_block-g{block[1]}")
    assert weights_of(path, plain).nbytes(f"{NAME}.weight") == weight.nbytes + scale.nbytes
    scheme["block_structure"] = [64, 64]
    with pytest.raises(CheckpointError, match=r"weight_scale is \[.*\], which does not fit"):
        open_published(str(folder.write(tmp_path / "model")))
    scheme["block_structure"] = [64, 0]
    with pytest.raises(CheckpointError, match=r"block_structure is \[64, 0\]; expected \[rows, columns\]"):
        open_published(str(folder.write(tmp_path / "model")))


def test_int8_codes_have_zero_points(plain, shape, tmp_path):
    weight = (torch.rand(shape) * 200 - 100).to(torch.int8)
    zero, scale = torch.arange(512, dtype=torch.int8).view(-1, 1), torch.rand(512, 1)
    folder = compressed(plain, 8, format="int-quantized")
    folder.replace(NAME, {"weight": weight, "weight_scale": scale, "weight_zero_point": zero})
    expected = (weight.double() - zero.double()) * scale.double()
    assert_decodes(folder.write(tmp_path / "model"), plain, expected.numpy(), "ct_uint8")


def test_columns_that_were_sorted_have_the_scales_of_their_groups(plain, shape, tmp_path):
    rows, cols = shape
    codes, scale = drawn(rows, cols, 4), torch.rand(rows, cols // GROUP)
    index = np.random.default_rng(2).permutation(np.arange(cols) // GROUP).astype(np.int32)
    folder = compressed(plain, 4)
    folder.replace(
        NAME,
        {
            "weight_packed": pack(codes, 4).view(np.int32),
            "weight_scale": scale,
            "weight_shape": np.array(shape, dtype=np.int64),
            "weight_g_idx": index,
        },
    )
    expected = (codes - 8.0) * scale.double().numpy()[:, index]
    assert_decodes(folder.write(tmp_path / "model"), plain, expected, f"ct_int4-g{GROUP}")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_codes_decode_as_defined(bits, plain, shape, tmp_path):
    rows, cols = shape
    codes = drawn(rows, cols, bits)
    scale, bias = torch.rand(rows, cols // GROUP).half(), torch.rand(rows, cols // GROUP).half()
    folder = Folder(
        plain, {"quantization": {"group_size": 64, "bits": 4, f"model.{NAME}": {"group_size": GROUP, "bits": bits}}}
    )
    parts = {"weight": torch.from_numpy(pack(codes, bits)), "scales": scale, "biases": bias}
    folder.replace(NAME, parts)
    grouped = codes.reshape(rows, -1, GROUP) * scale.double().numpy()[:, :, None] + bias.double().numpy()[:, :, None]
    folder = folder.write(tmp_path / "model")
    weights, name = weights_of(folder, plain), f"{NAME}.weight"
    expected = torch.from_numpy(grouped.reshape(rows, cols)).float()
    torch.testing.assert_close(weights.get(name).dequantize(), expected, rtol=1e-6, atol=1e-6)
    assert str(weights.get(name).spec) == f"mlx{bits}-g{GROUP}"
    assert weights.nbytes(name) == rows * cols * bits // 8 + 2 * scale.nbytes


def test_a_folder_of_our_own_codes_has_our_policys_divergence(mini, plain, windows, tmp_path):
    """Its scales are fp16, as ours are, and so are its codes: int4-g128."""
    ours = PolicySpec.parse("mlp=int4-g128,sliding_attention=int4-g128")
    stored, folder = PolicyWeights(mini, ours), compressed(plain, 4)
    quantized = [
        t for t in plain.tensors.values() if t.target and not t.unused and str(ours.spec_of(t.target)) != "bf16"
    ]
    for tensor in quantized:
        parts = stored.get(tensor.name).tensors()
        folder.replace(
            tensor.name.removesuffix(".weight"),
            {
                "weight_packed": parts["packed"].contiguous().view(torch.int32),
                "weight_scale": parts["scale"],
                "weight_shape": torch.tensor(tensor.shape),
            },
        )
    path = folder.write(tmp_path / "model-int4")
    theirs = PolicySpec.parse(f"file:{path}")
    assert theirs.name == "model-int4"
    found = evaluate(mini, {"ours": ours, "theirs": theirs}, windows)
    assert found["theirs"] == found["ours"]
    assert found["ours"].kl_divergence > 0
    assert str(opened(theirs, plain.config)).endswith(
        ",sliding_attention=ct_int4-g128,mlp=ct_int4-g128,kv=bf16,ple=all"
    )
    for tensor in quantized:
        assert tensor_nbytes(theirs, tensor) == tensor_nbytes(ours, tensor) + 16  # and its shape
    lines = differences(weights_of(path, plain), plain)
    assert all("no layer uses" in line for line in lines), lines


def test_what_engines_do_beside_the_weights_is_told(plain, tmp_path):
    folder = compressed(plain, 8, kv_cache_scheme={"num_bits": 8})
    folder.config["quantization_config"]["config_groups"]["group_8"]["input_activations"] = {"num_bits": 8}
    notes = open_published(str(folder.write(tmp_path / "model"))).notes
    assert [note.split(" too")[0] for note in notes] == ["engines quantize its activations", "engines quantize K and V"]


@pytest.mark.parametrize(
    ("option", "part"), [({"symmetric": False}, "weight_zero_point"), ({"actorder": "group"}, "weight_g_idx")]
)
def test_what_the_config_needs_to_decode_by_must_be_there(option, part, plain, shape, tmp_path):
    folder = compressed(plain, 4)
    folder.config["quantization_config"]["config_groups"]["group_4"]["weights"] |= option
    open_published(str(folder.write(tmp_path / "plain")))
    folder.replace(NAME, packed_parts(shape))
    with pytest.raises(CheckpointError, match=rf"up_proj\.weight: no {part}; expected it beside weight_packed"):
        open_published(str(folder.write(tmp_path / "model")))


def test_scales_of_k_and_v_are_no_weights(plain, tmp_path):
    folder = compressed(plain, 8, kv_cache_scheme={"num_bits": 8})
    names = [f"model.layers.0.self_attn.{part}_scale" for part in "kv"]
    folder.tensors |= dict.fromkeys(names, torch.ones(1))
    folder.tensors = {name: tensor.clone() for name, tensor in folder.tensors.items()}
    weights = weights_of(folder.write(tmp_path / "model"), plain)
    assert list(weights.file.others) == names


def packed_parts(shape, **changes):
    rows, cols = shape
    parts = {
        "weight_packed": torch.zeros(rows, cols // 8, dtype=torch.int32),
        "weight_scale": torch.ones(rows, cols // GROUP),
        "weight_shape": torch.tensor(shape),
    }
    return parts | changes


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"weight_scale": torch.ones(512, 7)},
            {},
            r"weight_scale is \[512, 7\], which does not fit a matrix \[512, 256\]",
        ),
        ({"weight_scale": torch.ones(4, 2)}, {}, r"weight_scale is \[4, 2\], which does not fit"),
        ({"weight_packed": torch.zeros(512, 30, dtype=torch.int32)}, {}, r"does not fit the config's \[4\] bits"),
        ({"weight_zero_point": torch.zeros(512, 8, dtype=torch.int32)}, {}, r"weight_zero_point is \[512, 8\]"),
        ({"weight_global_scale": torch.ones(1)}, {}, r"unknown part 'weight_global_scale'"),
        ({"weight_scale": torch.ones(512, 8, dtype=torch.uint8)}, {}, r"weight_scale is torch.uint8; expected floats"),
        ({"weight_shape": torch.ones(2)}, {}, r"weight_shape of 2 integers"),
        ({"weight_g_idx": torch.full((256,), 99, dtype=torch.int32)}, {}, r"names no group for each of 256 columns"),
        ({}, {"format": "nvfp4-pack-quantized"}, r"unknown format of compressed-tensors 'nvfp4-pack-quantized'"),
        ({}, {"transform_config": {"config_groups": {}}}, r"transform_config is unknown here"),
        ({}, {"config_groups": {}}, r"num_bits in its config are \[\]"),
        ({}, {"config_groups": {"": {"weights": {"num_bits": [4]}}}}, r"num_bits in its config are \[\[4\]\]"),
        ({}, {"quant_method": "gptq"}, r"unknown quantization method .gptq.; known: compressed-tensors, gemma"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(changes, options, message, plain, shape, tmp_path):
    folder = compressed(plain, 4, **options)
    folder.replace(NAME, packed_parts(shape, **changes))
    path = folder.write(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message) as raised:
        weights_of(path, plain).get(f"{NAME}.weight")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "scales", "message"),
    [
        ({"bits": 7}, (512, 8), "bits 7 and group_size 32 in the config are none of MLX's"),
        ({"mode": "mxfp4"}, (512, 8), "mode 'mxfp4' of MLX is unknown here"),
        ({}, (512, 4), r"scales are \[512, 4\], expected \[512, 8\]"),
        ({"group_size": 48}, (512, 8), "are no whole groups of 48"),
    ],
)
def test_an_mlx_folder_that_does_not_fit_is_refused(options, scales, message, plain, tmp_path):
    folder = Folder(plain, {"quantization": {"group_size": GROUP, "bits": 4} | options})
    parts = {
        "weight": torch.zeros(512, 32, dtype=torch.uint32),
        "scales": torch.ones(scales),
        "biases": torch.ones(512, 8),
    }
    folder.replace(NAME, parts)
    with pytest.raises(CheckpointError, match=message):
        open_published(str(folder.write(tmp_path / "model")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "x", "group_size": 64}, r"bits 'x' and group_size 64 in the config are none of MLX's"),
        ({"bits": True, "group_size": 64}, "bits True and"),
        ({"bits": 4, "group_size": [64]}, r"group_size \[64\] in"),
        ({"bits": 4, "group_size": 64.0}, "group_size 64.0 in"),
        ({"bits": 4}, "group_size None in"),
        ({}, "bits None"),
    ],
)
def test_an_mlx_config_is_read_also_where_no_tensor_is_quantized(options, message, plain, tmp_path):
    folder = Folder(plain, {"quantization": options})
    with pytest.raises(CheckpointError, match=message) as raised:
        open_published(str(folder.write(tmp_path / "model")))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("own", [False, "x", [4, 64], None])
def test_an_mlx_tensor_that_is_quantized_by_its_parts_alone_is_refused(own, plain, shape, tmp_path):
    folder = Folder(plain, {"quantization": {"group_size": GROUP, "bits": 4, f"model.{NAME}": own}})
    parts = {"weight": torch.zeros(512, 32, dtype=torch.uint32)}
    folder.replace(NAME, parts | {"scales": torch.ones(512, 8), "biases": torch.ones(512, 8)})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: the config says .* of it, but it is quantized"):
        open_published(str(folder.write(tmp_path / "model")))


def test_an_mlx_tensor_without_its_weight_is_refused(plain, tmp_path):
    folder = Folder(plain, {"quantization": {"group_size": GROUP, "bits": 4}})
    folder.replace(NAME, {"scales": torch.ones(512, 8), "biases": torch.ones(512, 8)})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: no weight; expected it beside biases, scales"):
        open_published(str(folder.write(tmp_path / "model")))


def test_a_config_that_is_otherwise_than_the_checkpoints_is_told_or_refused(plain, tmp_path):
    folder = compressed(plain, 4)
    assert not any("states another" in line for line in differences(weights_of(folder.write(tmp_path), plain), plain))
    folder.config["rms_norm_eps"] = 1e-5
    (line,) = differences(weights_of(folder.write(tmp_path), plain), plain)[:1]
    assert "(attention.layer_norm_rms_epsilon 1e-05, not 1e-06)" in line
    folder.config["tie_word_embeddings"] = False
    with pytest.raises(ConfigError, match="expected a head tied to embed_tokens"):
        open_published(str(folder.write(tmp_path)))


def test_a_folder_of_another_model_or_without_quantization_is_refused(plain, shape, tmp_path):
    folder = compressed(plain, 4)
    folder.replace(NAME, packed_parts((8, 256)))
    with pytest.raises(
        ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight is \[8, 256\], the checkpoint's \[512, 256\]"
    ):
        check(PolicySpec.parse(f"file:{folder.write(tmp_path / 'model')}"), plain.config)
    with pytest.raises(ConfigError, match=r"names no quantization"):
        open_published(str(MINI))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_method_gemma_decodes_as_transformers_does(bits, plain, shape, tmp_path):
    rows, cols = shape
    layer = QuantizedLinear(cols, rows, num_bits=bits)
    table = QuantizedEmbedding(2048, 576, torch.float32, num_bits=bits)
    for codes in (layer.weight, table.embedding_quantized):
        codes.data = torch.from_numpy(drawn(*codes.shape, 8).astype(np.uint8)).view(codes.dtype)
    layer.weight_scale.data = torch.rand(rows, 1)
    table.embedding_scale.data = torch.rand(2048, 1)
    layer.input_activation_scale.data = torch.tensor(0.5)
    method = {"quant_method": "gemma", "num_bits": bits, "quantize_embeddings": True}
    folder = Folder(plain, {"quantization_config": method})
    folder.replace(NAME, {name: parameter.data for name, parameter in layer.named_parameters()})
    folder.replace("embed_tokens_per_layer", {name: parameter.data for name, parameter in table.named_parameters()})
    path = folder.write(tmp_path / "model")
    assert_decodes(path, plain, layer._dequantize_weights().detach().numpy(), f"gemma_int{bits}")
    weights = weights_of(path, plain)
    assert torch.equal(weights.get("embed_tokens_per_layer.weight").dequantize(), table.weight)
    assert open_published(str(path)).notes == ("engines round its activations to 8 bits, which is not measured here",)
    folder.config["quantization_config"]["module_quant_configs"] = {r"up_proj$": {"num_bits": 3}}
    with pytest.raises(CheckpointError, match="by the config of 3 bits"):
        open_published(str(folder.write(tmp_path / "other")))


@pytest.mark.parametrize("method", [["awq"], {"awq": 1}, None])
def test_a_method_that_is_no_name_is_refused_beside_dangling_links(method, tmp_path):
    config = json.loads((MINI / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model.safetensors").symlink_to(MINI / "model.safetensors")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    with pytest.raises(CheckpointError, match="unknown quantization method"):
        open_published(str(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_refused_by_its_tensors_name(value, plain, shape, tmp_path):
    rows, cols = shape
    scale = np.ones((rows, 1), np.float32)
    scale[7] = value
    folder = compressed(plain, 8)
    folder.replace(NAME, {"weight": drawn(rows, cols, 7).astype(np.int8), "weight_scale": scale})
    weights = weights_of(folder.write(tmp_path), plain)
    with pytest.raises(CheckpointError, match=rf"{NAME}\.weight has NaN or infinity in row 7$"):
        weights.get(f"{NAME}.weight")
    weights.rows(f"{NAME}.weight", torch.tensor([6, 8]))
    with pytest.raises(CheckpointError, match=r"in row 7$"):
        weights.rows(f"{NAME}.weight", torch.tensor([8, 7]))
