"""A recipe as arguments of llama.cpp's `llama-quantize`, with the nearest of its types.

Each argument is `--tensor-type REGEX=TYPE`. The tool searches the expression in a tensor's name and, over its versions,
takes the first or the last that matches, so these are anchored and no tensor matches two (tools/quantize/README.md and
src/llama-quant.cpp of ggml-org/llama.cpp). It leaves `per_layer_model_proj` as it is whatever is said, so nothing is
said of it. Types whose blocks do not divide a row fall back to another there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from epic_quant.errors import RecipeError

# Weights and bytes of a block: gguf-py's GGML_QUANT_SIZES.
_BLOCKS: Mapping[str, tuple[int, int]] = {
    "q2_K": (256, 84),
    "q3_K": (256, 110),
    "q4_K": (256, 144),
    "q5_K": (256, 176),
    "q6_K": (256, 210),
    "q8_0": (32, 34),
    "bf16": (1, 2),
}
# Three levels a weight, so these stand for ternary schemes alone.
_TERNARY_BLOCKS: Mapping[str, tuple[int, int]] = {"tq1_0": (256, 54), "tq2_0": (256, 66)}

BITS: Mapping[str, float] = {
    name: 8 * nbytes / weights for name, (weights, nbytes) in {**_BLOCKS, **_TERNARY_BLOCKS}.items()
}

# Names without `.weight`, `{layers}` standing for numbers: gguf-py's MODEL_TENSOR_NAMES.
_TENSORS: Mapping[str, str] = {
    "sliding_attention": r"blk\.{layers}\.attn_(q|k|v|output)",
    "full_attention": r"blk\.{layers}\.attn_(q|k|v|output)",
    "mlp": r"blk\.{layers}\.ffn_(gate|up|down)",
    "ple_projections": r"blk\.{layers}\.(inp_gate|proj)",
    "ple_table": "per_layer_token_embd",
    "embedding": "token_embd",
}
_ATTENTION = ("sliding_attention", "full_attention")


def nearest_type(spec: str, bits_per_weight: float) -> str:
    """The type that is nearest in bits to what a class takes under `spec`, among those of its kind."""
    if spec == "bf16":
        return "bf16"
    types = _TERNARY_BLOCKS if "ternary" in spec else _BLOCKS
    return min(types, key=lambda name: abs(BITS[name] - bits_per_weight))


def tensor_type_arguments(types: Mapping[tuple[str, int | None], str], layer_types: Iterable[str] | None) -> list[str]:
    """`REGEX=TYPE` for every class, and for every part of a class in one layer; what is not said stays bf16.

    `types` are ggml types by class and layer, None for all layers of the class; `layer_types` is the type of each
    layer, which tells sliding layers from full ones. Raises RecipeError where those differ and it is None.
    """
    order = list(layer_types) if layer_types is not None else None
    found = []
    for tensor_class, pattern in _TENSORS.items():
        by_layer = {layer: name for (key, layer), name in types.items() if key == tensor_class and layer is not None}
        whole = types.get((tensor_class, None), "bf16")
        layers_of: dict[str, list[int] | None] = {}
        if by_layer:
            for layer, name in sorted(by_layer.items()):
                numbers = layers_of.setdefault(name, [])
                assert numbers is not None
                numbers.append(layer)
        elif tensor_class in _ATTENTION and not _is_same(types):
            if order is None:
                raise RecipeError("the JSON does not say which layers are full ('layer_types' among the run's facts)")
            layers_of[whole] = [layer for layer, layer_type in enumerate(order) if layer_type == tensor_class]
        else:
            layers_of[whole] = None
        for name, numbers in layers_of.items():
            found.append(f"^{pattern.replace('{layers}', _numbers(numbers))}\\.weight$={name}")
    return list(dict.fromkeys(found))


def _is_same(types: Mapping[tuple[str, int | None], str]) -> bool:
    """Whether sliding and full attention have one type, so that no layer need be told from another."""
    sliding, full = (types.get((tensor_class, None), "bf16") for tensor_class in _ATTENTION)
    return sliding == full and not any(key in _ATTENTION and layer is not None for key, layer in types)


def _numbers(layers: list[int] | None) -> str:
    return r"\d+" if layers is None else f"({'|'.join(map(str, layers))})"
