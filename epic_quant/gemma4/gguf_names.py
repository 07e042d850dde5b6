"""The text model's tensors by their names in a GGUF file of the architecture `gemma4`, and back.

The names are gguf-py's MODEL_TENSOR_NAMES. llama.cpp stores the tensors as they are: weights of norms without a shift
(`Gemma4Model.norm_shift` of its converter is 0), heads in the same order, scalars with one element.
"""

from __future__ import annotations

import re

from epic_quant.gemma4.tensors import TextTensor

ARCHITECTURE = "gemma4"

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "layer_scalar": "layer_output_scale",
}
_GLOBALS = {
    "embed_tokens": "token_embd",
    "embed_tokens_per_layer": "per_layer_token_embd",
    "per_layer_model_projection": "per_layer_model_proj",
    "per_layer_projection_norm": "per_layer_proj_norm",
    "norm": "output_norm",
}
_LAYER_BACK = {gguf: own for own, gguf in _LAYER.items()}
_GLOBALS_BACK = {gguf: own for own, gguf in _GLOBALS.items()}


def gguf_name(tensor: TextTensor) -> str:
    """A tensor's name in a GGUF file: `blk.0.attn_q.weight`, `token_embd.weight`."""
    local = tensor.local_name.removesuffix(".weight")
    return f"{_GLOBALS[local]}.weight" if tensor.layer is None else f"blk.{tensor.layer}.{_LAYER[local]}.weight"


def canonical_name(name: str) -> str | None:
    """A tensor's canonical name; None for what is no tensor of the text model, as `rope_freqs.weight` is none."""
    stem = name.removesuffix(".weight")
    if match := re.fullmatch(r"blk\.(\d+)\.(.+)", stem):
        found, prefix = _LAYER_BACK.get(match[2]), f"layers.{match[1]}."
    else:
        found, prefix = _GLOBALS_BACK.get(stem), ""
    if found is None:
        return None
    return f"{prefix}{found}" if found == "layer_scalar" else f"{prefix}{found}.weight"
