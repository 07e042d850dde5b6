"""What GGUF files of Gemma 4 call the tensors that have a spec: gguf-py's MODEL_TENSOR_NAMES."""

from __future__ import annotations

from collections.abc import Mapping

from epic_quant.spec.tensors import TensorClass

# Kinds of a layer's tensors, after `blk.LAYER.`.
GGUF_KINDS: Mapping[str, str] = {
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

# Classes that are one tensor.
GGUF_GLOBALS: Mapping[TensorClass, str] = {
    TensorClass.PLE_TABLE: "per_layer_token_embd",
    TensorClass.EMBEDDING: "token_embd",
    TensorClass.PLE_MODEL_PROJECTION: "per_layer_model_proj",
}
