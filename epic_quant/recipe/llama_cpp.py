"""A recipe as arguments of llama.cpp's `llama-quantize`: ggml's types as they are, other formats as the nearest type.

Each argument is `--tensor-type REGEX=TYPE`. The tool searches the expression in a tensor's name and, over its versions,
takes the first or the last that matches, so these are anchored and no tensor matches two (tools/quantize/README.md and
src/llama-quant.cpp of ggml-org/llama.cpp). It leaves `per_layer_model_proj` as it is whatever is given, so no argument
names it. Types whose blocks do not divide a row fall back to another there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from epic_quant.spec import BF16, FORMATS, Target, TensorClass, WeightSpec

# Types by the format of this project that is the same, as llama.cpp writes them, and their bits a weight.
_TYPES: Mapping[str, str] = {name: name.replace("_k", "_K") for name, info in FORMATS.items() if info.block_nbytes}
BITS: Mapping[str, float] = {
    "bf16": 16.0,
    **{ggml: 8 * FORMATS[name].block_nbytes / FORMATS[name].block_size for name, ggml in _TYPES.items()},
}

# The types that stand for other formats: those with three levels a weight for ternary ones alone.
_NEAREST = ("q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "q8_0", "bf16")
_NEAREST_TERNARY = ("tq1_0", "tq2_0")

# The names of a layer's tensors, after `blk.LAYER.`, and of the tables: gguf-py's MODEL_TENSOR_NAMES.
_KINDS: Mapping[str, str] = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
}
_TABLES: Mapping[TensorClass, str] = {
    TensorClass.PLE_TABLE: "per_layer_token_embd",
    TensorClass.EMBEDDING: "token_embd",
}


def nearest_type(spec: WeightSpec, bits_per_weight: float) -> str:
    """The type that `spec` is, or that is nearest in bits to what a tensor takes under it, among those of its kind."""
    if spec == BF16:
        return "bf16"
    if spec.format in _TYPES:
        return _TYPES[spec.format]
    types = _NEAREST_TERNARY if spec.info.num_levels == 3 else _NEAREST
    return min(types, key=lambda name: abs(BITS[name] - bits_per_weight))


def tensor_type_arguments(types: Mapping[Target, str]) -> list[str]:
    """`REGEX=TYPE` for all tensors of `types`, which are ggml types by the tensor's target.

    Tensors of the same type whose kinds have it in the same layers share an argument.
    """
    by_kind: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    tables = []
    for target, ggml_type in types.items():
        if target.kind is not None and target.layer is not None:
            by_kind[target.kind][ggml_type].append(target.layer)
        elif target.tensor_class in _TABLES:
            tables.append(f"^{_TABLES[target.tensor_class]}\\.weight$={ggml_type}")
    grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
    for kind, name in _KINDS.items():
        for ggml_type, layers in by_kind[kind].items():
            # One type in all its layers holds for those too whose K and V are unused.
            numbers = r"\d+" if len(by_kind[kind]) == 1 else _one_of(sorted(layers))
            grouped[numbers, ggml_type].append(name)
    blocks = [
        rf"^blk\.{numbers}\.{_one_of(names)}\.weight$={ggml_type}" for (numbers, ggml_type), names in grouped.items()
    ]
    return [*blocks, *tables]


def _one_of(words: Iterable[object]) -> str:
    return f"({'|'.join(map(str, words))})"
