"""What a KV spec does to attention: exact K, V and queries of a text, against what a cache returns of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epic_quant.gemma4.block import plain_linear, rms_norm
from epic_quant.gemma4.config import LayerSpec, TextConfig
from epic_quant.gemma4.model import begin
from epic_quant.gemma4.rope import rotate
from epic_quant.gemma4.weights import Weights
from epic_quant.kv.cache import KVCache
from epic_quant.metrics import relative, squared_norm
from epic_quant.quant import Weight
from epic_quant.spec import KVSpec

# Tokens between two checkpoints: a prime whose multiples are spread evenly over what is left of blocks of 32, 64
# and 128, so that blocks are met at every filling.
STEP_TOKENS = 101


@dataclass(frozen=True)
class CapturedActivations:
    """The inputs of attention on T tokens of a text: fp32, after norm and RoPE."""

    config: TextConfig
    queries: Mapping[int, Tensor]  # of every layer: [num_heads, T, head_dim]
    keys: Mapping[int, Tensor]  # of the KV source layers: [num_kv_heads, T, head_dim]
    values: Mapping[int, Tensor]
    hidden: Tensor  # after the last layer, which `gemma4.model.head` takes: [1, T, hidden_size]


@dataclass(frozen=True)
class KVError:
    """The errors of one KV spec on the layers of one type, all layers, heads and checkpoints together."""

    k_rel_l2: float
    v_rel_l2: float
    logit_rms: float  # of q·k̂ - q·k over all keys that a query sees, in units of the logit
    attention_rel_l2: float  # of softmax(q k̂ᵀ) v̂


def capture(weights: Weights, token_ids: Tensor) -> CapturedActivations:
    """Run token ids [T] through the model in fp32, without a cache. Raises TokenError as `TextModel.logits` does."""
    config, recorder = weights.config, _Recorder()
    projected: dict[str, Tensor] = {}

    def observe(x: Tensor, weight: Weight, name: str) -> Tensor:
        y = plain_linear(x, weight)
        if name == "self_attn.q_proj.weight":
            projected["q"] = y
        return y

    hidden, forward = begin(weights, token_ids[None], cache=recorder)
    queries = {}
    for spec in config.layers:
        layer = weights.layer(spec.index)
        hidden = forward.layer(hidden, layer, spec, observe)
        heads = projected["q"][0].view(-1, spec.attention.num_heads, spec.attention.head_dim).transpose(0, 1)
        heads = rms_norm(heads, layer["self_attn.q_norm.weight"], config.rms_norm_eps)
        queries[spec.index] = rotate(heads, forward.rope[spec.layer_type])
    keys, values = ({index: kv[which] for index, kv in recorder.kept.items()} for which in (0, 1))
    return CapturedActivations(config, queries, keys, values, hidden)


class AttentionError:
    """The error of any KV spec on the layers of one type, against the exact K and V of some texts.

    A text goes into a cache `step` tokens at a time. At each checkpoint, after a step, the newest token's queries, of
    the layer itself and of those that share its K and V, attend to what the cache returns: what a decoder would see
    there, the tokens that the spec leaves unquantized for now included.
    """

    def __init__(self, texts: Sequence[CapturedActivations], layer_type: str, step: int = STEP_TOKENS) -> None:
        self._texts, self._step = texts, step
        self._sources = [s for s in texts[0].config.layers if s.is_kv_source and s.layer_type == layer_type]
        # The exact logits and outputs are the same for all specs.
        self._exact = [
            {
                (source.index, end): _attend(*self._parts(text, source, end))
                for source in self._sources
                for end in self._ends(text)
            }
            for text in texts
        ]

    def of(self, spec: KVSpec) -> KVError:
        """Store the texts' K and V under `spec` and attend to them. Raises as `KVCache` does."""
        totals = {name: torch.zeros(2, dtype=torch.float64) for name in ("k", "v", "logit", "attention")}
        for text, exact in zip(self._texts, self._exact, strict=True):
            cache = KVCache(text.config, spec)
            for source in self._sources:
                for end in self._ends(text):
                    query, k, v = self._parts(text, source, end)
                    new = slice(max(0, end - self._step), end)
                    added = text.keys[source.index][None, :, new], text.values[source.index][None, :, new]
                    cache.append(source.index, *added)
                    kept = cache.keys(source.index), cache.values(source.index)
                    stored = [x[0, :, -k.shape[1] :] for x in kept]
                    logits, attention = _attend(query, *stored)
                    exact_logits, exact_attention = exact[source.index, end]
                    totals["k"] += _squares(stored[0], k)
                    totals["v"] += _squares(stored[1], v)
                    totals["attention"] += _squares(attention, exact_attention)
                    totals["logit"] += torch.tensor([squared_norm(logits - exact_logits), logits.numel()])
        parts = {name: relative(*map(float, total)) for name, total in totals.items()}
        return KVError(parts["k"], parts["v"], parts["logit"], parts["attention"])

    def _ends(self, text: CapturedActivations) -> range:
        tokens = text.hidden.shape[1]
        return range(min(self._step, tokens), tokens + 1, self._step)

    def _parts(self, text: CapturedActivations, source: LayerSpec, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """After `end` tokens: the queries [num_kv_heads, queries, head_dim], and the K and V that they see."""
        readers = (spec.index for spec in text.config.layers if spec.kv_source == source.index)
        queries = [
            # A group of query heads reads one KV head.
            text.queries[index][:, end - 1].view(source.attention.num_kv_heads, -1, source.attention.head_dim)
            for index in readers
        ]
        seen = slice(max(0, end - (source.attention.sliding_window or end)), end)
        return torch.cat(queries, dim=1), text.keys[source.index][:, seen], text.values[source.index][:, seen]


class _Recorder:
    """A `KVStore` for one forward from the start of a text: keeps all it is given and returns it."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.kept[layer] = k[0], v[0]
        return k, v


def _attend(query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [num_kv_heads, queries, tokens] and outputs [num_kv_heads, queries, head_dim]; the scale is 1."""
    logits = query @ k.mT
    return logits, logits.softmax(dim=-1) @ v


def _squares(actual: Tensor, expected: Tensor) -> Tensor:
    return torch.tensor([squared_norm(actual - expected), squared_norm(expected)], dtype=torch.float64)
