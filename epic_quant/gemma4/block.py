"""One decoder layer of Gemma 4.

In comments B is batch, S tokens of this forward, K keys attended to, H hidden_size, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from epic_quant.gemma4.config import LayerSpec, TextConfig
from epic_quant.gemma4.kv_store import ForwardKV
from epic_quant.gemma4.rope import RopeTable, rotate
from epic_quant.quant import Weight, linear

# Most queries that attend together; fewer where the window is shorter. More would compute more masked scores, fewer
# make products too small to be fast.
_BLOCK_QUERIES = 128
_KEYS = 64

# Computes x @ weight.T, as `quant.linear` does; also gets the weight's name inside the layer.
Linear = Callable[[Tensor, Weight, str], Tensor]


def plain_linear(x: Tensor, weight: Weight, name: str = "") -> Tensor:
    """The `Linear` of an ordinary forward: `quant.linear`, whatever the name."""
    return linear(x, weight)


def decoder_block(
    hidden: Tensor,
    weights: Mapping[str, Weight],
    spec: LayerSpec,
    *,
    config: TextConfig,
    ple: Tensor | None,
    rope: RopeTable,
    mask: Tensor,
    kv: ForwardKV,
    apply: Linear = plain_linear,
) -> Tensor:
    """One layer: hidden [B, S, H] -> [B, S, H], in the dtype of `hidden`; plain weights are cast to it.

    `weights` are keyed by their name inside the layer; `ple` [B, S, ple_dim] is this layer's slice of the per-layer
    inputs (None where the model has none); `rope` is the table of the S tokens for this layer's type; `mask` is
    `model.attention_masks`' bool [S, all tokens so far] for it. A KV source layer's K and V go through `kv`, a sharing
    layer takes its source's from there, so that layer must have run before. `apply` is called for every matrix; give
    another one to see its inputs.

    The formula is `Gemma4TextDecoderLayer` of `transformers`: norms and softmax in fp32 whatever the dtype.
    """
    layer = _Layer(weights, config.rms_norm_eps, apply)
    x = layer.norm(hidden, "input_layernorm")
    x = _attention(x, layer, spec, rope, mask, kv)
    hidden = hidden + layer.norm(x, "post_attention_layernorm")

    x = layer.norm(hidden, "pre_feedforward_layernorm")
    x = _mlp(x, layer)
    hidden = hidden + layer.norm(x, "post_feedforward_layernorm")

    if ple is not None:
        x = _per_layer_input(hidden, layer, ple)
        hidden = hidden + layer.norm(x, "post_per_layer_input_norm")
    scalar = weights["layer_scalar"]
    assert isinstance(scalar, Tensor)
    return hidden * scalar.to(hidden.dtype)


def rms_norm(x: Tensor, weight: Weight | None, eps: float) -> Tensor:
    """Divide x by the root mean square of its last dim, times the weight itself (not 1 + weight); fp32, cast back."""
    normed = x.float()
    normed = normed * torch.pow(normed.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    if weight is not None:
        assert isinstance(weight, Tensor), "norms are in no tensor class, so no policy quantizes them"
        # By way of the dtype of x, to which a loaded model's weight would have been cast.
        normed = normed * weight.to(x.dtype).float()
    return normed.to(x.dtype)


@dataclass(frozen=True)
class _Layer:
    """A layer's weights by name, and the steps that use them."""

    weights: Mapping[str, Weight]
    eps: float
    apply: Linear

    def linear(self, x: Tensor, name: str) -> Tensor:
        return self.apply(x, self.weights[f"{name}.weight"], f"{name}.weight")

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[f"{name}.weight"], self.eps)


def _attention(x: Tensor, layer: _Layer, spec: LayerSpec, rope: RopeTable, mask: Tensor, kv: ForwardKV) -> Tensor:
    batch, tokens, _ = x.shape

    def heads(name: str, count: int) -> Tensor:  # [B, count, S, D]
        return layer.linear(x, name).view(batch, tokens, count, spec.attention.head_dim).transpose(1, 2)

    q = rotate(layer.norm(heads("self_attn.q_proj", spec.attention.num_heads), "self_attn.q_norm"), rope)
    if spec.is_kv_source:
        k = rotate(layer.norm(heads("self_attn.k_proj", spec.attention.num_kv_heads), "self_attn.k_norm"), rope)
        v = rms_norm(heads("self_attn.v_proj", spec.attention.num_kv_heads), None, layer.eps)
        k, v = kv.write(spec, k, v)  # [B, num_kv_heads, K, D]
    else:
        k, v = kv.read(spec)

    mask = mask[:, -k.shape[-2] :]  # the K newest
    mixed = [
        _attention_output(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask[queries, keys])
        for queries, keys in query_blocks(spec.attention.sliding_window, tokens, k.shape[-2])
    ]
    return layer.linear(torch.cat(mixed, dim=1), "self_attn.o_proj")


def _attention_output(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q Kᵀ) V: q [B, num_heads, S, D], k and v [B, num_kv_heads, K, D] -> [B, S, num_heads * D]."""
    batch, num_heads, tokens, head_dim = q.shape
    # Query heads that share a KV head are adjacent, so a group is one longer matrix and K is not repeated.
    q = q.reshape(batch, k.shape[1], -1, head_dim)  # [B, num_kv_heads, group * S, D]
    scores = (q @ k.mT).view(batch, num_heads, tokens, -1)  # [B, num_heads, S, K]; the scale is 1
    scores = scores.masked_fill_(mask, -torch.inf)
    shares = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    mixed = shares.view(batch, k.shape[1], -1, k.shape[-2]) @ v  # [B, num_kv_heads, group * S, D]
    return mixed.view(batch, num_heads, tokens, head_dim).transpose(1, 2).flatten(2)


def query_blocks(sliding_window: int | None, tokens: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Which of `tokens` queries attend together, and of `keys` keys those that any of them sees.

    The last key is the last query's own; there are at least as many keys as queries. Causality and the window leave
    most of a long text's scores mask, and these blocks are what is computed of them. Keys go in whole multiples of
    `_KEYS`, so that a softmax adds a row up in the order in which it would add up the whole one: masked keys are 0 in
    it, and what remains stays in its lanes.
    """
    window = keys if sliding_window is None else sliding_window
    step = min(-(-window // _KEYS) * _KEYS, _BLOCK_QUERIES)
    own = keys - tokens  # of the first query
    for first in range(0, tokens, step):
        last = min(first + step, tokens)
        oldest = max(0, own + first + 1 - window) // _KEYS * _KEYS
        yield slice(first, last), slice(oldest, min(-(-(own + last) // _KEYS) * _KEYS, keys))


def num_scores(sliding_window: int | None, tokens: int) -> int:
    """Scores that a head computes for a text of `tokens` from its start, masked ones among them."""
    return sum(
        (queries.stop - queries.start) * (keys.stop - keys.start)
        for queries, keys in query_blocks(sliding_window, tokens, tokens)
    )


def _mlp(x: Tensor, layer: _Layer) -> Tensor:
    gate = functional.gelu(layer.linear(x, "mlp.gate_proj"), approximate="tanh")
    return layer.linear(gate * layer.linear(x, "mlp.up_proj"), "mlp.down_proj")


def _per_layer_input(hidden: Tensor, layer: _Layer, ple: Tensor) -> Tensor:
    gate = functional.gelu(layer.linear(hidden, "per_layer_input_gate"), approximate="tanh")  # [B, S, ple_dim]
    return layer.linear(gate * ple, "per_layer_projection")
