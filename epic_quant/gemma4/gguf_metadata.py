"""The model in GGUF's metadata, by key without its architecture, and the factors of RoPE, which are a tensor there.

The keys are those that llama.cpp's converter writes (conversion/gemma.py) and its loader reads (src/models/gemma4.cpp).
"""

from __future__ import annotations

from epic_quant.gemma4.config import SLIDING, TextConfig

Value = int | float | list[int] | list[bool]

ROPE_FACTORS = "rope_freqs.weight"
# What a frequency is divided by where a pair of dims does not rotate: llama.cpp's converter has the same number.
_NO_ROTATION = 1e30


def metadata(config: TextConfig) -> dict[str, Value]:
    """Numbers, and lists with one of each layer."""
    full = config.layers[-1].attention
    sliding = next((layer.attention for layer in config.layers if layer.layer_type == SLIDING), full)
    cap = config.final_logit_softcapping
    return {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": _each([layer.mlp.intermediate_size for layer in config.layers]),
        "attention.head_count": _each([layer.attention.num_heads for layer in config.layers]),
        "attention.head_count_kv": _each([layer.attention.num_kv_heads for layer in config.layers]),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **({} if cap is None else {"final_logit_softcapping": cap}),
        "embedding_length_per_layer_input": config.ple_dim,
        "attention.shared_kv_layers": sum(not layer.is_kv_source for layer in config.layers),
        "attention.sliding_window": sliding.sliding_window or config.max_position_embeddings,
        "attention.sliding_window_pattern": [layer.layer_type == SLIDING for layer in config.layers],
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "rope.dimension_count": full.head_dim,
        "rope.freq_base": full.rope.theta,
        "attention.key_length_swa": sliding.head_dim,
        "attention.value_length_swa": sliding.head_dim,
        "rope.dimension_count_swa": sliding.head_dim,
        "rope.freq_base_swa": sliding.rope.theta,
    }


def rope_factors(config: TextConfig) -> list[float]:
    """What llama.cpp divides the frequencies of full layers by, for each pair of dims: so it makes p-RoPE."""
    attention = config.layers[-1].attention  # a full layer
    rope = attention.rope
    return [rope.factor] * rope.rotated_pairs + [_NO_ROTATION] * (attention.head_dim // 2 - rope.rotated_pairs)


def _each(values: list[int]) -> int | list[int]:
    """One value where all layers have the same."""
    return values[0] if len(set(values)) == 1 else values
