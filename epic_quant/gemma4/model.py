"""The text model, from token ids to logits, a layer at a time.

`TextModel` is a loop over pieces that can be used alone, so that a caller may send several hidden states through a
layer before it asks for the next layer's weights:

    hidden, forward = begin(weights, token_ids, dtype)
    for spec in weights.config.layers:
        hidden = forward.layer(hidden, weights.layer(spec.index), spec)
    logits = head(weights, hidden)

In comments B is batch, S tokens, H hidden_size, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from epic_quant.errors import TokenError
from epic_quant.gemma4.block import Linear, decoder_block, plain_linear, rms_norm
from epic_quant.gemma4.config import LayerSpec, TextConfig
from epic_quant.gemma4.kv_store import ForwardKV, KVStore
from epic_quant.gemma4.rope import RopeTable, rope_table
from epic_quant.gemma4.weights import Weights
from epic_quant.quant import Weight, linear

_HEAD_ROWS = 16384  # rows of the vocabulary that are cast at a time


class TextModel:
    """The text model over any weights, computing in `dtype`."""

    def __init__(self, weights: Weights, dtype: torch.dtype = torch.float32) -> None:
        self.weights, self.dtype = weights, dtype

    @property
    def config(self) -> TextConfig:
        """The weights' config."""
        return self.weights.config

    def logits(self, token_ids: Tensor, cache: KVStore | None = None, start: int = 0) -> Tensor:
        """Logits [B, S, vocab] of token ids [B, S] of any integer dtype.

        With a cache, of B sequences, the tokens come after the `start` tokens that it already has; it takes them in.
        Raises TokenError on ids out of range, and where `start` is not the number of tokens in the cache.
        """
        hidden, forward = begin(self.weights, token_ids, self.dtype, cache, start)
        for spec in self.config.layers:
            hidden = forward.layer(hidden, self.weights.layer(spec.index), spec)
        return head(self.weights, hidden)

    def hidden_states(self, token_ids: Tensor, cache: KVStore | None = None, start: int = 0) -> Iterator[Tensor]:
        """The hidden state [B, S, H] before every layer, then the one after the last, unnormed: L + 1 in all.

        Arguments and errors as for `logits`.
        """
        hidden, forward = begin(self.weights, token_ids, self.dtype, cache, start)
        for spec in self.config.layers:
            yield hidden
            hidden = forward.layer(hidden, self.weights.layer(spec.index), spec)
        yield hidden


@dataclass(frozen=True)
class Forward:
    """State shared by the layers of one forward."""

    config: TextConfig
    per_layer_inputs: Tensor | None  # [B, S, L, ple_dim]
    rope: Mapping[str, RopeTable]  # by layer type
    masks: Mapping[str, Tensor]  # by layer type, as `attention_masks` has them
    kv: ForwardKV

    def layer(
        self, hidden: Tensor, weights: Mapping[str, Weight], spec: LayerSpec, apply: Linear = plain_linear
    ) -> Tensor:
        """Send hidden [B, S, H] through a layer. Layers go in order, since later ones read earlier ones' K and V."""
        return decoder_block(
            hidden,
            weights,
            spec,
            config=self.config,
            ple=None if self.per_layer_inputs is None else self.per_layer_inputs[:, :, spec.index],
            rope=self.rope[spec.layer_type],
            mask=self.masks[spec.layer_type],
            kv=self.kv,
            apply=apply,
        )


def begin(
    weights: Weights,
    token_ids: Tensor,
    dtype: torch.dtype = torch.float32,
    cache: KVStore | None = None,
    start: int = 0,
) -> tuple[Tensor, Forward]:
    """The hidden state [B, S, H] before the first layer, and what all layers need. Raises as `TextModel.logits`."""
    config = weights.config
    check_token_ids(token_ids, config)
    tokens = token_ids.shape[1]
    hidden = embed(weights, token_ids, dtype)
    return hidden, Forward(
        config=config,
        per_layer_inputs=per_layer_inputs(weights, token_ids, hidden),
        rope=rope_tables(config, torch.arange(start, start + tokens), dtype),
        masks=attention_masks(config, tokens, start),
        kv=ForwardKV(config, cache, start),
    )


def check_token_ids(token_ids: Tensor, config: TextConfig) -> None:
    """Raise TokenError unless these are integers of [B, S], at least one, that every table of the model has."""
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise TokenError(f"token ids are {token_ids.dtype}; expected integers")
    if token_ids.dim() != 2 or not token_ids.numel():
        raise TokenError(f"token ids are of shape {list(token_ids.shape)}; expected [batch, tokens], at least one")
    limit = min(config.vocab_size, config.ple_vocab_size) if config.ple_dim else config.vocab_size
    wide = token_ids.long()
    outside = wide[(wide < 0) | (wide >= limit)]
    if outside.numel():
        raise TokenError(f"token id {int(outside[0])} is out of range; expected 0 to {limit - 1}")


def embed(weights: Weights, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Token ids [B, S] -> the hidden state before the first layer, [B, S, H]: rows times sqrt(H) rounded to `dtype`."""
    return _scaled_rows(weights, "embed_tokens.weight", token_ids, dtype, weights.config.hidden_size)


def per_layer_inputs(
    weights: Weights, token_ids: Tensor, embedded: Tensor, apply: Linear = plain_linear
) -> Tensor | None:
    """The PLE inputs of all layers, [B, S, L, ple_dim] in the dtype of `embedded`, which is `embed`'s [B, S, H].

    A token's own rows and a projection of its embedding, added; so they depend on the token id alone. None where the
    model has no PLE. `apply` is called for the projection, as `decoder_block` calls it.
    """
    config = weights.config
    if not config.ple_dim:
        return None
    by_layer = (*token_ids.shape, config.num_layers, config.ple_dim)
    token = _scaled_rows(weights, "embed_tokens_per_layer.weight", token_ids, embedded.dtype, config.ple_dim)
    context_scale: float = config.hidden_size**-0.5
    sum_scale: float = 2**-0.5
    projection = "per_layer_model_projection.weight"
    context = apply(embedded, weights.get(projection), projection) * context_scale
    norm = weights.get("per_layer_projection_norm.weight")
    context = rms_norm(context.view(by_layer), norm, config.rms_norm_eps)
    return (context + token.view(by_layer)) * sum_scale


def rope_tables(config: TextConfig, positions: Tensor, dtype: torch.dtype) -> dict[str, RopeTable]:
    """The RoPE table of each layer type for positions [S]; layers of a type share one."""
    return {
        layer_type: rope_table(spec.attention, positions, dtype)
        for layer_type, spec in _one_of_each_type(config).items()
    }


def attention_masks(config: TextConfig, tokens: int, start: int = 0) -> dict[str, Tensor]:
    """For each layer type what tokens `start` on may not see: bool [tokens, start + tokens], True where masked.

    A token sees itself and what is before it, on sliding layers `sliding_window` tokens in all.
    """
    query = torch.arange(start, start + tokens)[:, None]
    key = torch.arange(start + tokens)[None, :]
    masks = {}
    for layer_type, spec in _one_of_each_type(config).items():
        masks[layer_type] = key > query
        if spec.attention.sliding_window is not None:
            masks[layer_type] |= query - key >= spec.attention.sliding_window
    return masks


def head(weights: Weights, hidden: Tensor) -> Tensor:
    """Logits [..., vocab] of hidden states [..., H] after the last layer; see `head_logits`."""
    return head_logits(weights.config, hidden, weights.get("norm.weight"), weights.get("embed_tokens.weight"))


def head_logits(config: TextConfig, hidden: Tensor, norm: Weight, table: Weight) -> Tensor:
    """Logits [..., ids], soft-capped, in the dtype of `hidden` [..., H]; `table` [ids, H] has the ids' embeddings.

    Every token's logits are its own, so a caller short of memory may give a few tokens at a time. A plain embedding is
    cast to that dtype some rows at a time, since the whole of a large one would not fit.
    """
    hidden = rms_norm(hidden, norm, config.rms_norm_eps)
    if isinstance(table, Tensor):
        logits = hidden.new_empty(*hidden.shape[:-1], len(table))
        for first in range(0, len(table), _HEAD_ROWS):
            rows = slice(first, first + _HEAD_ROWS)
            logits[..., rows] = linear(hidden, table[rows])
    else:
        logits = linear(hidden, table)
    if (cap := config.final_logit_softcapping) is not None:
        logits.div_(cap).tanh_().mul_(cap)  # in place: logits are the largest tensor there is
    return logits


def _scaled_rows(weights: Weights, name: str, token_ids: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    rows = weights.rows(name, token_ids.flatten().long()).to(dtype).view(*token_ids.shape, -1)  # [B, S, cols]
    return rows * torch.tensor(dim**0.5, dtype=dtype)


def _one_of_each_type(config: TextConfig) -> dict[str, LayerSpec]:
    return {spec.layer_type: spec for spec in config.layers}
