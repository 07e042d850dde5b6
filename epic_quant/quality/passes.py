"""The cost of evaluating: the RAM of a pass, which limits the variants in it, and its multiplications."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from epic_quant import machine
from epic_quant.errors import TokenError
from epic_quant.gemma4.block import num_scores, query_blocks
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TextTensor
from epic_quant.policy import spec_of
from epic_quant.quality.stream import BATCH_TOKENS, HEAD_ROWS, HEAD_TOKENS
from epic_quant.quality.variants import (
    StartKey,
    TensorKey,
    Variant,
    head_key,
    matrices,
    signature,
    start_key,
)
from epic_quant.spec import REFERENCE, TensorClass, WeightSpec

# Where the system does not say what is free.
_UNKNOWN_AVAILABLE_NBYTES = 8 * 10**9

# What the process holds over what its tensors take: C libraries keep freed pieces (glibc those under 32 MiB) in a heap
# with holes. Four policies on 2048 tokens of E4B's layers take 1.21 GB, and 1.42 to 1.47 with the holes.
_HEAP = 1.2


def default_memory_nbytes() -> int:
    """Half of what can be had without swapping."""
    available = machine.available_nbytes()
    return (_UNKNOWN_AVAILABLE_NBYTES if available is None else available) // 2


class Needs(NamedTuple):
    """What a variant needs in RAM. What several need alike is there once."""

    state: int  # its states, to the end
    start: StartKey  # what comes before the first layer
    table: tuple[torch.dtype, TensorKey]  # the embedding, for the head
    stored: frozenset[tuple[TextTensor, TensorKey]]  # what is quantized of the layers


@dataclass(frozen=True)
class Memory:
    """Bytes of anonymous memory that a pass takes at most."""

    config: TextConfig
    num_windows: int
    window_tokens: int

    def nbytes(self, needs: Iterable[Needs]) -> int:
        """Of a pass with these: what waits of each, and what the largest layer or the head takes beside it."""
        states, starts, tables, stored = (set(parts) for parts in zip(*needs, strict=True))
        waiting = len(states) * self.state_nbytes + len(starts) * self._ple_nbytes
        working = max(self._layer_nbytes(frozenset().union(*stored)), self._head_nbytes(len(tables)))
        return math.ceil((waiting + working) * _HEAP)

    def needs(self, variants: Mapping[str, Variant]) -> dict[str, Needs]:
        """What each needs, by its name."""
        signatures = {name: signature(variant, self.config) for name, variant in variants.items()}
        numbers = {found: number for number, found in enumerate(dict.fromkeys(signatures.values()))}
        return {
            name: Needs(
                state=numbers[signatures[name]],
                start=start_key(variant, self.config),
                table=head_key(variant, self.config),
                stored=frozenset(
                    (tensor, key)
                    for layer in self.config.layers
                    for tensor in matrices(self.config)[layer.index]
                    if (key := variant.key(tensor)) is not None
                ),
            )
            for name, variant in variants.items()
        }

    @property
    def _tokens(self) -> int:
        return self.num_windows * self.window_tokens

    @property
    def state_nbytes(self) -> int:
        """Of one variant: hidden states, K and V that later layers share, and a few numbers a token, of all windows."""
        sources = {spec.kv_source for spec in self.config.layers if not spec.is_kv_source}
        shared = sum(
            2 * spec.attention.num_kv_heads * spec.attention.head_dim
            for spec in self.config.layers
            if spec.index in sources
        )
        return self._tokens * (4 * self.config.hidden_size + 4 * shared + 48)

    @property
    def _ple_nbytes(self) -> int:
        """PLE inputs of every distinct token, and the file's rows that they are made of while that is done."""
        distinct = min(self._tokens, self.config.vocab_size)
        return distinct * self.config.num_layers * self.config.ple_dim * 4 * 2

    def _layer_nbytes(self, stored: Collection[tuple[TextTensor, TensorKey]]) -> int:
        """The largest layer decoded to fp32 and quantized, a byte a weight; and what a batch of windows needs in it."""
        quantized = dict.fromkeys(range(self.config.num_layers), 0)
        for tensor, _ in stored:
            assert tensor.layer is not None
            quantized[tensor.layer] += math.prod(tensor.shape)
        weights = max(4 * numel + quantized[layer] for layer, numel in enumerate(layer_numel(self.config)))
        windows = max(1, min(self.num_windows, BATCH_TOKENS // self.window_tokens))
        tokens = windows * self.window_tokens
        wide = max(3 * layer.mlp.intermediate_size for layer in self.config.layers) + 6 * self.config.hidden_size
        # Scores of a block of queries, their softmax, and one to spare.
        scores: int = max(
            layer.attention.num_heads * (queries.stop - queries.start) * (keys.stop - keys.start)
            for layer in self.config.layers
            for queries, keys in query_blocks(layer.attention.sliding_window, self.window_tokens, self.window_tokens)
        )
        attention = 3 * 4 * windows * scores
        return weights + 4 * tokens * wide + attention

    def _head_nbytes(self, num_tables: int) -> int:
        rows = min(HEAD_ROWS, self.config.vocab_size)
        return (
            rows * (num_tables + 1) * 4 * self.config.hidden_size + 6 * 8 * min(HEAD_TOKENS, self.window_tokens) * rows
        )


def passes(variants: Mapping[str, Variant], memory: Memory, memory_nbytes: int) -> list[tuple[str, ...]]:
    """The names that go through the file together, the reference first in every pass; as few passes as fit.

    Variants that begin alike stand together, since they share what that takes. Raises TokenError where the reference
    and a single variant need more.
    """
    needs = memory.needs(variants)
    starts = list(dict.fromkeys(need.start for need in needs.values()))
    names = sorted((name for name in variants if name != REFERENCE), key=lambda name: starts.index(needs[name].start))
    batches = [[REFERENCE]]
    for name in names:
        if len(batches[-1]) > 1 and memory.nbytes(needs[one] for one in [*batches[-1], name]) > memory_nbytes:
            batches.append([REFERENCE])
        batches[-1].append(name)
    least = max(memory.nbytes(needs[name] for name in batch[:2]) for batch in batches)
    if least > memory_nbytes:
        raise TokenError(
            f"{memory.num_windows} windows of {memory.window_tokens} tokens need {least / 1e9:,.2f} GB of RAM, but "
            f"{memory_nbytes / 1e9:,.2f} GB are allowed; take fewer windows or more memory"
        )
    return [tuple(batch) for batch in batches]


@cache
def layer_numel(config: TextConfig) -> tuple[int, ...]:
    """The weights of each layer's matrices."""
    found = matrices(config)
    return tuple(sum(math.prod(tensor.shape) for tensor in found[layer.index]) for layer in config.layers)


def work(variants: Sequence[Variant], config: TextConfig, num_windows: int, window_tokens: int) -> list[int]:
    """Multiplications in each layer of a pass, and last in its head: what agrees so far is done once.

    By weights, and of queries with keys and of their shares with values; the rest is no matrix product.
    """
    signatures = [signature(variant, config) for variant in variants]
    tokens = num_windows * window_tokens
    numel = layer_numel(config)
    layers = []
    for layer in config.layers:
        states = len({found[: layer.index + 2] for found in signatures})
        attention = 2 * num_scores(layer.attention.sliding_window, window_tokens)
        attention *= layer.attention.num_heads * layer.attention.head_dim
        layers.append(states * num_windows * (window_tokens * numel[layer.index] + attention))
    return [*layers, tokens * config.vocab_size * config.hidden_size * len(set(signatures))]


def quantized_numel(variants: Sequence[Variant], config: TextConfig) -> dict[tuple[WeightSpec, str | None], int]:
    """Weights that a pass quantizes under each spec, or decodes from each published file in each that it has.

    A tensor counts once, however many variants share it. Of tables that is every row, for the head, and none for the
    PLE table, of which only the text's rows are taken.
    """
    found: Counter[tuple[WeightSpec, str | None]] = Counter()
    for tensors in matrices(config).values():
        for tensor in tensors:
            if tensor.tensor_class is not TensorClass.PLE_TABLE:
                for key, variant in {variant.key(tensor): variant for variant in variants}.items():
                    if key is not None and (spec := spec_of(variant.policy, tensor)) is not None:
                        found[spec, variant.policy.file] += math.prod(tensor.shape)
    return dict(found)
