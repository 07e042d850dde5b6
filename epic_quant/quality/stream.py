"""One pass over the file: a layer is read once, and every variant's hidden states go through it before the next.

    stream = Stream(checkpoint, variants, windows, hessians)
    stream.begin()
    for spec in stream.config.layers:
        stream.layer(spec)
    measures = stream.measures()

In comments N is windows, T the tokens of each, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError
from epic_quant.gemma4.block import decoder_block
from epic_quant.gemma4.config import LayerSpec, TextConfig
from epic_quant.gemma4.kv_store import ForwardKV
from epic_quant.gemma4.model import attention_masks, embed, head_logits, per_layer_inputs, rope_tables
from epic_quant.kv import KVCache
from epic_quant.quality.measures import Divergence, ReferenceSlice, Softmax, TokenMeasures
from epic_quant.quality.variants import (
    LayerKey,
    StartKey,
    TensorKey,
    Variant,
    embedding,
    grouped,
    head_key,
    layer_key,
    start_key,
)
from epic_quant.quant import Hessian, Weight
from epic_quant.spec import REFERENCE, KVSpec

# Tokens that go through a layer together, in whole windows. It depends on nothing else, so that neither the number of
# variants nor the memory allowed can change a bit of the result.
BATCH_TOKENS = 1024

# Logits that stand in RAM together, for every variant in turn; two or three tensors of them, in fp64.
HEAD_TOKENS = 256
HEAD_ROWS = 8192


class WindowsKV(ForwardKV):
    """The K and V of some windows in one forward, through a cache while `spec` says how.

    All of a window's tokens are stored before any is read, as when a prompt is read at once: a token finds even its
    newest neighbours as the cache returns them, where a decoder with a residual window would not yet.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self._config = config
        self.spec: KVSpec | None = None

    def write(self, spec: LayerSpec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `ForwardKV.write`, of [windows, num_kv_heads, T, head_dim]."""
        if self.spec is not None:
            k, v = KVCache(self._config, self.spec, k.dtype, batch_size=len(k)).update(spec.index, k, v)
        return super().write(spec, k, v)

    @property
    def shared(self) -> dict[int, tuple[Tensor, Tensor]]:
        """K and V that later layers read, by the layer that is their source."""
        return self._shared

    def fork(self) -> WindowsKV:
        """Another forward that was the same so far; they hold the same tensors, which nothing changes."""
        other = WindowsKV(self._config)
        other._shared = dict(self._shared)
        return other

    def drop_after(self, spec: LayerSpec) -> None:
        """Let go of what no layer after this one reads."""
        needed = {later.kv_source for later in self._config.layers[spec.index + 1 :]}
        self._shared = {source: kv for source, kv in self._shared.items() if source in needed}


@dataclass
class State:
    """What variants that agree so far have come to: the hidden state [N, T, H], and each batch of windows' K and V."""

    members: tuple[str, ...]
    hidden: Tensor
    kv: list[WindowsKV]

    def fork(self, members: tuple[str, ...]) -> State:
        """A copy for some of its members."""
        return State(members, self.hidden.clone(), [kv.fork() for kv in self.kv])


class Stream:
    """A pass for `variants`, the reference among them, on `windows` int64 [N, T]; `hessians` as `PolicyWeights` has.

    Between two calls `states` is all that it has come to, and may be put there in place of `begin` or of some layers.
    """

    def __init__(
        self, checkpoint: Checkpoint, variants: Mapping[str, Variant], windows: Tensor, hessians: Mapping[str, Hessian]
    ) -> None:
        self._checkpoint, self._variants, self._windows = checkpoint, variants, windows
        self._weights = {name: variant.weights(checkpoint, hessians) for name, variant in variants.items()}
        self.config = self._weights[REFERENCE].config
        # What precedes the first layer depends on a token's id alone, so it is computed and held once for each id.
        self._ids, self._id_of = windows.unique(return_inverse=True)  # [distinct], [N, T]
        step = max(1, BATCH_TOKENS // windows.shape[1])
        self._batches = [slice(first, first + step) for first in range(0, len(windows), step)]
        positions = torch.arange(windows.shape[1])
        self._rope = {
            dtype: rope_tables(self.config, positions, dtype) for dtype in {v.dtype for v in variants.values()}
        }
        self._masks = attention_masks(self.config, windows.shape[1])
        self._ple: dict[StartKey, Tensor | None] = {}  # [distinct, num_layers, ple_dim]
        self.states: list[State] = []

    def begin(self) -> None:
        """Compute the states before the first layer."""
        for key, names in grouped(self._variants, lambda name: start_key(self._variants[name], self.config)).items():
            hidden = self._start(key, names[0])[self._id_of]
            self.states.append(State(tuple(names), hidden, [WindowsKV(self.config) for _ in self._batches]))

    def resume(self, states: list[State]) -> None:
        """Continue from the states of an equal stream."""
        for state in states:
            if (key := self._start_key(state)) not in self._ple:
                self._start(key, state.members[0])
        self.states = states

    def _start(self, key: StartKey, name: str) -> Tensor:
        """Keep the PLE inputs of every distinct id; return its hidden state before the first layer, [distinct, H]."""
        weights = self._weights[name]
        embedded = embed(weights, self._ids[None], key.dtype)
        ple = per_layer_inputs(weights, self._ids[None], embedded)
        self._ple[key] = None if ple is None else ple[0]
        return embedded[0]

    def _start_key(self, state: State) -> StartKey:
        return start_key(self._variants[state.members[0]], self.config)

    def layer(self, spec: LayerSpec) -> None:
        """Send all states through the next layer, after those that no longer agree have parted.

        Raises QuantizationError for a weight that cannot be quantized as asked, CheckpointError where hidden states
        are not finite any more.
        """
        self.states = [part for state in self.states for part in self._parted(state, spec)]
        stored: dict[tuple[str, TensorKey], Weight] = {}

        def weights_key(state: State) -> tuple[torch.dtype, tuple[TensorKey, ...]]:
            return self._start_key(state).dtype, self._layer_key(state.members[0], spec).weights

        for (dtype, _), states in grouped(self.states, weights_key).items():
            weights = self._decoded(spec, states[0].members[0], dtype, stored)
            for state in states:
                self._through(state, spec, weights)
            # Before others are decoded: two layers of fp32 would be what a pass takes most of.
            del weights

    def _layer_key(self, name: str, spec: LayerSpec) -> LayerKey:
        return layer_key(self._variants[name], spec, self.config)

    def _parted(self, state: State, spec: LayerSpec) -> list[State]:
        first, *others = grouped(state.members, partial(self._layer_key, spec=spec)).values()
        forks = [state.fork(tuple(members)) for members in others]
        state.members = tuple(first)
        return [state, *forks]

    def _decoded(
        self, spec: LayerSpec, member: str, dtype: torch.dtype, stored: dict[tuple[str, TensorKey], Weight]
    ) -> dict[str, Weight]:
        """A layer's weights as they are computed with; `stored` has what was quantized for others."""
        weights, variant = self._weights[member], self._variants[member]
        decoded: dict[str, Weight] = {}
        for tensor in weights.tensors.values():
            if tensor.layer != spec.index or tensor.unused:
                continue
            key = tensor.name, variant.key(tensor)
            if key not in stored:
                stored[key] = weights.get(tensor.name)
            decoded[tensor.local_name] = _in_dtype(stored[key], dtype) if tensor.target else stored[key]
        return decoded

    def _through(self, state: State, spec: LayerSpec, weights: Mapping[str, Weight]) -> None:
        key = self._start_key(state)
        variant = self._variants[state.members[0]]
        kv_spec = None if variant.kv(spec) is None else variant.policy.kv_of(spec.index)
        ple = self._ple[key]
        for windows, kv in zip(self._batches, state.kv, strict=True):
            kv.spec = kv_spec
            state.hidden[windows] = decoder_block(
                state.hidden[windows],
                weights,
                spec,
                config=self.config,
                ple=None if ple is None else ple[:, spec.index][self._id_of[windows]],
                rope=self._rope[key.dtype][spec.layer_type],
                mask=self._masks[spec.layer_type],
                kv=kv,
            )
            kv.drop_after(spec)
        if not state.hidden.isfinite().all():
            raise CheckpointError(
                f"{self._checkpoint.source}: under {state.members[0]} the hidden states after layer {spec.index} are "
                "not finite; is there NaN or infinity in a weight?"
            )

    def measures(self) -> dict[str, TokenMeasures]:
        """What came out for every variant, once all states have gone through all layers.

        The vocabulary goes by a slice at a time, and within it the tokens: all logits never stand in RAM.
        """
        right = self._windows[:, 1:]
        reference, divergences = Softmax(right), [Divergence(right) for _ in self.states]
        ours = next(state for state in self.states if REFERENCE in state.members)
        for first in range(0, self.config.vocab_size, HEAD_ROWS):
            rows = torch.arange(first, min(first + HEAD_ROWS, self.config.vocab_size))
            tables = {
                key: self._rows_of_head(states[0].members[0], rows)
                for key, states in grouped(self.states, self._head_key).items()
            }
            for at in self._head_slices():
                logits = self._logits(ours, tables, at)
                beside = ReferenceSlice(reference, at, first, logits)
                for state, divergence in zip(self.states, divergences, strict=True):
                    theirs = logits if state is ours else self._logits(state, tables, at)
                    divergence.add(at, first, beside, theirs)
        return {
            name: divergence.measures(reference)
            for state, divergence in zip(self.states, divergences, strict=True)
            for name in state.members
        }

    def _head_slices(self) -> Iterator[tuple[int, slice]]:
        """Some tokens of one window at a time, the last one left out: nothing comes after it."""
        predicted = self._windows.shape[1] - 1
        for window in range(len(self._windows)):
            for first in range(0, predicted, HEAD_TOKENS):
                yield window, slice(first, min(first + HEAD_TOKENS, predicted))

    def _head_key(self, state: State) -> tuple[torch.dtype, TensorKey]:
        return head_key(self._variants[state.members[0]], self.config)

    def _logits(
        self, state: State, tables: Mapping[tuple[torch.dtype, TensorKey], Tensor], at: tuple[int, slice]
    ) -> Tensor:
        norm = self._weights[state.members[0]].get("norm.weight")
        assert isinstance(norm, Tensor)
        self._check(state.members[0], "norm.weight", norm)
        return head_logits(self.config, state.hidden[at], norm, tables[self._head_key(state)]).double()

    def _rows_of_head(self, member: str, rows: Tensor) -> Tensor:
        """Rows of the tied embedding as they are computed with. Every format keeps rows apart, so no other is read."""
        name = embedding(self.config).name
        found = self._weights[member].rows(name, rows)
        self._check(member, name, found)
        return found.to(self._variants[member].dtype)

    def _check(self, member: str, name: str, values: Tensor) -> None:
        """Of what the head computes with: no hidden state shows its faults, and soft-capping hides infinity."""
        if not values.isfinite().all():
            raise CheckpointError(f"{self._checkpoint.source}: under {member} {name} has NaN or infinity")


def _in_dtype(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)
