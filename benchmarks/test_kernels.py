"""Products with packed weights, for the shapes of E4B's blocks: how fast, beside torch, onnxruntime and the memory.

Weights are seeded noise. Each call takes the next of several copies that together are larger than the caches, as a
model's layers are. Error first: of the product against the same weights decoded in fp64.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from epic_quant.gemma4.config import SLIDING, TextConfig
from epic_quant.gemma4.kv_store import ForwardKV
from epic_quant.gemma4.model import Forward, attention_masks, rope_tables
from epic_quant.gemma4.tensors import expected_tensors
from epic_quant.metrics import relative_l2
from epic_quant.quant import from_tensors, linear, quantize
from epic_quant.records.subjects import KernelsRecord
from epic_quant.spec import WeightSpec

E4B = TextConfig.from_json(
    json.loads((Path(__file__).parent / "facts" / "gemma-4-E4B.config.json").read_text(encoding="utf-8"))
)
SLIDING_LAYER = next(spec for spec in E4B.layers if spec.layer_type == SLIDING and spec.is_kv_source)
LAYER_TENSORS = [tensor for tensor in expected_tensors(E4B) if tensor.layer == SLIDING_LAYER.index]
SHAPES = {tensor.local_name.removesuffix(".weight"): tensor.shape for tensor in LAYER_TENSORS if len(tensor.shape) == 2}
# Larger than the last cache of the machines at hand.
ROTATED_NBYTES = 96e6
# Rows that are quantized; a weight repeats them, since their values do not change the time.
DISTINCT_ROWS = 256
GROUP = 128

SPECS = (
    *("int4-g128", "int3-g128", "ternary", "codebook4", "codebook3", "int8-g128", "int2-g128", "int4", "int4-g32"),
    *("q4_k", "q6_k", "q8_0"),
    *("trellis2", "trellis3", "trellis4"),
)
ACTIVATIONS = ("int8", "fp32")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def repeated(part, rows):
    """The rows of a part over and over: `rows` of them, in memory of their own."""
    return part.repeat(-(-rows // part.shape[0]), 1)[:rows].contiguous()


def repeated_matrix(part, rows):
    """A stored matrix of the rows of a part over and over, in memory of its own."""
    tensors = {name: repeated(tensor, rows) for name, tensor in part.tensors().items()}
    return from_tensors(part.spec, tensors, (rows, part.shape[1]))


def packed_calls(how, distinct, rows, x):
    """A call for each copy of the weight in a spec, times x; the weights decoded; bytes of one; what computes."""
    spec, _, activations = how.partition(" ")
    quantized = quantize(distinct, WeightSpec.parse(spec))
    whole = repeated_matrix(quantized, rows)
    copies = [repeated_matrix(quantized, rows) for _ in range(num_copies(whole.nbytes))]
    calls = [lambda weight=weight: linear(x, weight, activations) for weight in copies]
    return calls, quantized.dequantize(torch.float64), whole.nbytes, whole.computed_by(activations)


def plain_calls(how, distinct, rows, x):
    dtype = {"torch bf16": torch.bfloat16, "torch fp32": torch.float32}[how]
    part, x = distinct.to(dtype), x.to(dtype)
    copies = [repeated(part, rows) for _ in range(num_copies(rows * part.shape[1] * part.itemsize))]
    calls = [lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in copies]
    return calls, part.double(), copies[0].nbytes, how


def symmetric_int4(distinct):
    """Codes [rows, cols] from 0 to 15 around 8 and scales [rows, groups] of the peers' four-bit format."""
    rows, cols = distinct.shape
    groups = distinct.view(rows, cols // GROUP, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    codes = (groups / scale).round().clamp(-8, 7) + 8
    decoded = ((codes - 8) * scale).view(rows, cols).double()
    return codes.view(rows, cols).to(torch.uint8), scale.squeeze(-1), decoded


def torch_int4_calls(how, distinct, rows, x):
    codes, scale, decoded = symmetric_int4(distinct)
    # This kernel's weight is (code - 8) * scale + zero.
    scales = torch.stack([repeated(scale, rows), torch.zeros(rows, scale.shape[1])], -1).transpose(0, 1).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(repeated(codes, rows).int(), 2)
    copies = [packed.clone() for _ in range(num_copies(packed.nbytes))]
    calls = [
        lambda weight=weight: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, GROUP, scales) for weight in copies
    ]
    return calls, decoded, packed.nbytes + scales.nbytes, how


def onnxruntime_calls(how, distinct, rows, x):
    onnx = pytest.importorskip("onnx", reason="pip install -e '.[peers]' brings onnxruntime")
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[peers]' brings it")
    codes, scale, decoded = symmetric_int4(distinct)
    nibbles = codes.view(codes.shape[0], -1, GROUP // 2, 2)
    blob = repeated((nibbles[..., 0] | nibbles[..., 1] << 4).flatten(1), rows)
    scales = repeated(scale, rows)
    cols = distinct.shape[1]
    helper, float_ = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=cols,
        N=rows,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,  # int8 activations
    )
    constants = [
        onnx.numpy_helper.from_array(blob.view(rows, cols // GROUP, GROUP // 2).numpy(), "codes"),
        onnx.numpy_helper.from_array(scales.flatten().numpy(), "scales"),
    ]
    ends = [helper.make_tensor_value_info(*info) for info in (("x", float_, [None, cols]), ("y", float_, [None, rows]))]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    nbytes = blob.nbytes + scales.nbytes
    sessions = [
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(num_copies(nbytes))
    ]
    inputs = {"x": x.numpy()}
    calls = [lambda session=session: torch.from_numpy(session.run(None, inputs)[0]) for session in sessions]
    return calls, decoded, nbytes, how


def num_copies(nbytes):
    return int(ROTATED_NBYTES // nbytes) + 2


PEERS = {
    "torch bf16": plain_calls,
    "torch fp32": plain_calls,
    "torch int4": torch_int4_calls,
    "onnxruntime int4": onnxruntime_calls,
}
# The largest matrix, at one token, by the most telling; the rest takes minutes.
LEAN = ("torch bf16", "torch fp32", "int4-g128 int8", "int4-g128 fp32", "ternary int8")
HOWS = (*PEERS, *(f"{spec} {activations}" for spec in SPECS for activations in ACTIVATIONS))
CASES = [
    ("mlp.up_proj", tokens, how) if tokens == 1 and how in LEAN else slow("mlp.up_proj", tokens, how)
    for tokens in (1, 4, 16, 64, 512)
    for how in HOWS
    if how != "torch int4" or tokens <= 16  # 12 s for 512
]
CASES += [
    slow(name, 1, how) for name in SHAPES if name != "mlp.up_proj" for how in (*PEERS, "int4-g128 int8", "ternary int8")
]


def product_record(weight, tokens, how, error, nbytes, computed_by=None):
    return KernelsRecord(
        weight=weight,
        tokens=tokens,
        how=how,
        output_rel_l2=error,
        nbytes=nbytes,
        bytes_read=nbytes,
        computed_by=computed_by,
    )


@pytest.mark.parametrize(("name", "tokens", "how"), CASES)
def test_linear(name, tokens, how, record, benchmark):
    """One weight of the block times some tokens."""
    rows, cols = SHAPES[name]
    if cols % GROUP:
        pytest.skip(f"a group of {GROUP} does not divide rows of {cols}")
    distinct, x = gaussian(min(rows, DISTINCT_ROWS), cols), gaussian(tokens, cols, seed=1)
    calls, decoded, nbytes, computed_by = PEERS.get(how, packed_calls)(how, distinct, rows, x)
    with torch.inference_mode():
        product = calls[0]()
        assert product.shape == (tokens, rows)
        error = relative_l2(product.double(), (x.double() @ decoded.T)[:, torch.arange(rows) % len(decoded)])
        bound = {"torch fp32": 1e-5}.get(how, 1e-5 if how.endswith("fp32") else 0.02)
        assert error < bound
        weight = f"{name} [{rows}, {cols}]"
        record(product_record(weight, tokens, how, error, nbytes, computed_by))
        turns = itertools.cycle(calls)
        rounds = 40 if tokens <= 4 else 10 if tokens <= 64 else 3
        benchmark.pedantic(lambda: next(turns)(), rounds=rounds, warmup_rounds=2)


BLOCKS = ("bf16", "int4-g128 int8", "int4-g128 fp32", "ternary int8")


@pytest.mark.slow
@pytest.mark.parametrize("how", BLOCKS)
def test_e4b_block(how, record, benchmark):
    """A whole sliding block of E4B's shapes at one token, in bf16 and from packed weights."""
    spec, _, activations = how.partition(" ")
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    copies = []
    for _ in range(2):
        weights = {}
        for index, tensor in enumerate(LAYER_TENSORS):
            if len(tensor.shape) != 2:
                weights[tensor.local_name] = torch.ones(tensor.shape, dtype=dtype)
                continue
            rows, cols = tensor.shape
            distinct = gaussian(min(rows, DISTINCT_ROWS), cols, seed=index) / cols**0.5
            if how == "bf16":
                weights[tensor.local_name] = repeated(distinct.bfloat16(), rows)
            else:
                weights[tensor.local_name] = repeated_matrix(quantize(distinct, WeightSpec.parse(spec)), rows)
        copies.append(weights)
    hidden = gaussian(1, 1, E4B.hidden_size, seed=1).to(dtype)
    ple = gaussian(1, 1, E4B.num_layers, E4B.ple_dim, seed=2).to(dtype)
    forward = Forward(E4B, ple, rope_tables(E4B, torch.arange(1), dtype), attention_masks(E4B, 1), ForwardKV(E4B))

    def call(weights, apply):
        return replace(forward, kv=ForwardKV(E4B)).layer(hidden, weights, SLIDING_LAYER, apply)

    def exact(x, weight, name):
        return linear(x, weight if how == "bf16" else weight.dequantize())

    def packed(x, weight, name):
        return linear(x, weight, activations or "fp32")

    with torch.inference_mode():
        expected, output = call(copies[0], exact), call(copies[0], packed)
        error = relative_l2(output.float(), expected.float())
        assert error < (1e-4 if activations != "int8" else 0.05)
        nbytes = sum(weight.nbytes for weight in copies[0].values())
        record(product_record("whole sliding block", 1, "torch bf16" if how == "bf16" else how, error, nbytes))
        turns = itertools.cycle(copies)
        benchmark.pedantic(lambda: call(next(turns), packed), rounds=40, warmup_rounds=2)
