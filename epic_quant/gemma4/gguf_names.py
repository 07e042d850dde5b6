"""The text model's tensors by their names in a GGUF file of the architecture `gemma4`, and back.

llama.cpp stores them as they are: weights of norms without a shift (`Gemma4Model.norm_shift` of its converter is 0),
heads in the same order, scalars with one element.
"""

from __future__ import annotations

from collections.abc import Mapping

from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TextTensor, expected_tensors
from epic_quant.spec.gguf import GGUF_GLOBALS, GGUF_KINDS

ARCHITECTURE = "gemma4"

# Tensors in no class, by their local name without `.weight`.
_OTHERS: Mapping[str, str] = {
    "norm": "output_norm",
    "per_layer_projection_norm": "per_layer_proj_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "post_per_layer_input_norm": "post_norm",
    "layer_scalar": "layer_output_scale",
}


def gguf_name(tensor: TextTensor) -> str:
    """A tensor's name in a GGUF file: `blk.0.attn_q.weight`, `token_embd.weight`."""
    target = tensor.target
    if target is None:
        name = _OTHERS[tensor.local_name.removesuffix(".weight")]
    else:
        name = GGUF_GLOBALS[target.tensor_class] if target.kind is None else GGUF_KINDS[target.kind]
    return f"{name}.weight" if tensor.layer is None else f"blk.{tensor.layer}.{name}.weight"


def by_gguf_name(config: TextConfig) -> Mapping[str, TextTensor]:
    """All text tensors of the config, unused ones included, by their name in a GGUF file."""
    return {gguf_name(tensor): tensor for tensor in expected_tensors(config)}
