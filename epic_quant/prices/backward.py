"""One forward and one backward pass, streamed: what every linear layer saw, and the gradient at its output.

Labels are drawn from the model's own distribution, one a token, and the loss -Σ log p(label) is propagated back. The
hidden state is kept at every layer's border; backwards each layer is computed again, so that one layer's graph is alive
at a time. In comments N is windows, T the tokens of each, H hidden_size, D head_dim.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from epic_quant.errors import CheckpointError
from epic_quant.gemma4.block import decoder_block, rms_norm
from epic_quant.gemma4.config import LayerSpec, TextConfig
from epic_quant.gemma4.kv_store import ForwardKV
from epic_quant.gemma4.model import Forward, attention_masks, embed, per_layer_inputs, rope_tables
from epic_quant.gemma4.weights import Weights
from epic_quant.quant import Weight

# Tokens that go through a layer together, in whole windows, and ones whose logits stand in RAM together.
_BATCH_TOKENS = 1024
_HEAD_TOKENS = 256
_HEAD_ROWS = 8192

EMBEDDING, PLE_TABLE = "embed_tokens.weight", "embed_tokens_per_layer.weight"
MODEL_PROJECTION = "per_layer_model_projection.weight"


@dataclass(frozen=True)
class Linear:
    """A linear layer: its inputs [tokens, cols] and the gradient at its outputs [tokens, rows], of all N·T tokens."""

    name: str  # canonical
    weight: Tensor  # [rows, cols] in the dtype of the pass
    x: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Rows:
    """Looked-up rows of a table [tokens, cols] in fp32, and the gradient at each."""

    name: str
    ids: Tensor  # int64 [tokens]
    rows: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class KeysValues:
    """K and V of a source layer as a cache would take them, after norm and RoPE, and the gradients at them.

    All are [N, num_kv_heads, T, D]; gradients are those of the layer itself and of all that share its K and V.
    """

    layer: int
    k: Tensor
    v: Tensor
    k_gradient: Tensor
    v_gradient: Tensor


@dataclass(frozen=True)
class HeadRows:
    """A slice of the tied head: rows `first` on of the embedding [ids, H], and the gradient at each token's logits.

    `x` [tokens, H] are the normed hidden states, `gradient` [tokens, ids] is before the soft cap.
    """

    first: int
    weight: Tensor
    x: Tensor
    gradient: Tensor


Captured = Linear | Rows | KeysValues | HeadRows


class Backward:
    """The pass on `windows` int64 [N, T], BOS first, in fp32, with its matrix products in `dtype`.

    Hidden states wait at L + 1 borders: 4·N·T·H·(L + 1) bytes, in RAM, or with `folder` in a file there. Raises
    CheckpointError, naming the layer, where states or gradients are not finite.
    """

    def __init__(
        self,
        weights: Weights,
        windows: Tensor,
        seed: int,
        folder: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.weights, self.config = weights, weights.config
        self._dtype = dtype
        self._windows = windows
        self._labels_seed = seed
        step = max(1, _BATCH_TOKENS // windows.shape[1])
        self._batches = [slice(first, first + step) for first in range(0, len(windows), step)]
        self._rope = rope_tables(self.config, torch.arange(windows.shape[1]), torch.float32)
        self._masks = attention_masks(self.config, windows.shape[1])
        self._borders = _Borders((self.config.num_layers + 1, *windows.shape, self.config.hidden_size), folder)
        self._shared: dict[int, list[tuple[Tensor, Tensor]]] = {}  # K and V by source layer, a pair for each batch

    @property
    def num_predicted(self) -> int:
        """Tokens whose prediction is part of the loss: all but the last of each window."""
        return len(self._windows) * (self._windows.shape[1] - 1)

    def run(self, progress: Callable[[str], None] = lambda where: None) -> Iterator[Captured]:
        """Everything that there is a gradient at: the head's slices, then the layers from the last, then the tables.

        What is yielded is only valid until the next is asked for. `progress` is called with what comes next.
        """
        ple = self._forward(progress)
        progress("head")
        gradient = yield from self._head()
        ple_gradient = None if ple is None else torch.zeros_like(ple)
        kv_gradients: dict[int, list[list[Tensor]]] = {}
        for spec in reversed(self.config.layers):
            progress(f"layer {spec.index + 1} of {self.config.num_layers} backwards")
            yield from self._layer(spec, gradient, ple, ple_gradient, kv_gradients)
            _check_finite(gradient, f"the gradient at the input of layer {spec.index}", self.weights)
        progress("tables")
        yield from self._tables(gradient, ple_gradient)

    @torch.no_grad()
    def _forward(self, progress: Callable[[str], None]) -> Tensor | None:
        """Fill the borders and keep the K and V that later layers share; returns the PLE inputs [N, T, L, ple_dim]."""
        hidden = embed(self.weights, self._windows, torch.float32)
        ple = per_layer_inputs(self.weights, self._windows, hidden)
        forwards = [
            Forward(self.config, None if ple is None else ple[batch], self._rope, self._masks, ForwardKV(self.config))
            for batch in self._batches
        ]
        self._borders[0] = hidden
        for spec in self.config.layers:
            progress(f"layer {spec.index + 1} of {self.config.num_layers}")
            weights = self._decoded(spec)
            for batch, forward in zip(self._batches, forwards, strict=True):
                hidden[batch] = forward.layer(hidden[batch], weights, spec, _product)
            _check_finite(hidden, f"the hidden state after layer {spec.index}", self.weights)
            self._borders[spec.index + 1] = hidden
        sources = {spec.kv_source for spec in self.config.layers if not spec.is_kv_source}
        self._shared = {
            source: [forward.kv.read(self.config.layers[source]) for forward in forwards] for source in sources
        }
        return ple

    def _decoded(self, spec: LayerSpec) -> dict[str, Weight]:
        """A layer's weights, decoded once for all batches: matrices in the dtype of products."""
        return {
            name: weight.to(self._dtype) if isinstance(weight, Tensor) else weight.dequantize(self._dtype)
            for name, weight in self.weights.layer(spec.index).items()
        }

    def _head(self) -> Generator[HeadRows, None, Tensor]:
        """Yields the head's slices and returns the gradient [N, T, H] at the last border."""
        hidden = self._borders[self.config.num_layers]
        norm = self.weights.get("norm.weight")
        x = rms_norm(hidden, norm, self.config.rms_norm_eps).flatten(0, 1)  # [N·T, H]
        labels, log_sum = self._labels(x)
        gradient = torch.zeros_like(x)
        is_last = torch.zeros(self._windows.shape, dtype=torch.bool)
        is_last[:, -1] = True
        for first, table in self._head_slices():
            at_logits = torch.empty(len(x), len(table))
            for tokens in _slices(len(x), _HEAD_TOKENS):
                logits = self._logits(x[tokens], table)
                chances = (logits - log_sum[tokens, None]).exp_()
                own = labels[tokens] - first
                inside = (own >= 0) & (own < len(table))
                chances[inside.nonzero().flatten(), own[inside]] -= 1
                if (cap := self.config.final_logit_softcapping) is not None:
                    chances *= 1 - (logits / cap).square_()
                at_logits[tokens] = chances
            at_logits[is_last.flatten()] = 0
            gradient += (at_logits.to(table.dtype) @ table).float()
            yield HeadRows(first, table, x, at_logits)
        at_border = hidden.clone().requires_grad_()
        rms_norm(at_border, norm, self.config.rms_norm_eps).flatten(0, 1).backward(gradient)
        assert at_border.grad is not None
        _check_finite(at_border.grad, "the gradient at the head", self.weights)
        return at_border.grad

    @torch.no_grad()
    def _labels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A label for each token, drawn from the softmax by the Gumbel-max trick; and log Σ exp of its logits."""
        rng = torch.Generator().manual_seed(self._labels_seed)
        log_sum = torch.full((len(x),), -torch.inf)
        largest, labels = log_sum.clone(), torch.zeros(len(x), dtype=torch.int64)
        for first, table in self._head_slices():
            for tokens in _slices(len(x), _HEAD_TOKENS):
                logits = self._logits(x[tokens], table)
                log_sum[tokens] = torch.logaddexp(log_sum[tokens], logits.logsumexp(-1))
                noisy = logits - torch.empty_like(logits).exponential_(generator=rng).log_()
                value, index = noisy.max(-1)
                better = value > largest[tokens]
                labels[tokens] = torch.where(better, index + first, labels[tokens])
                largest[tokens] = torch.where(better, value, largest[tokens])
        return labels, log_sum

    def _logits(self, x: Tensor, table: Tensor) -> Tensor:
        logits = _product(x, table)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits.div_(cap).tanh_().mul_(cap)
        return logits

    def _head_slices(self) -> Iterator[tuple[int, Tensor]]:
        for rows in _slices(self.config.vocab_size, _HEAD_ROWS):
            yield rows.start, self.weights.rows(EMBEDDING, torch.arange(rows.start, rows.stop)).to(self._dtype)

    def _layer(
        self,
        spec: LayerSpec,
        gradient: Tensor,
        ple: Tensor | None,
        ple_gradient: Tensor | None,
        kv_gradients: dict[int, list[list[Tensor]]],
    ) -> Iterator[Captured]:
        """Overwrites `gradient` [N, T, H] at the layer's output with that at its input, and yields what it captured."""
        weights = self._decoded(spec)
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        own: list[tuple[Tensor, ...]] = []
        for number, batch in enumerate(self._batches):
            outputs: dict[str, tuple[Tensor, Tensor]] = {}

            def apply(
                x: Tensor, weight: Weight, name: str, outputs: dict[str, tuple[Tensor, Tensor]] = outputs
            ) -> Tensor:
                y = _product(x, weight)
                y.retain_grad()
                outputs[name] = x.detach(), y
                return y

            hidden = self._borders[spec.index][batch].clone().requires_grad_()
            its_ple = None if ple is None else ple.detach()[batch, :, spec.index].clone().requires_grad_()
            kv = _KV(self.config, None if spec.is_kv_source else self._shared[spec.kv_source][number])
            with torch.enable_grad():
                out = decoder_block(
                    hidden,
                    weights,
                    spec,
                    config=self.config,
                    ple=its_ple,
                    rope=self._rope[spec.layer_type],
                    mask=self._masks[spec.layer_type],
                    kv=kv,
                    apply=apply,
                )
            roots, gradients = [out], [gradient[batch]]
            if spec.index in kv_gradients:  # What the layers that share its K and V have found.
                roots += kv.pair
                gradients += kv_gradients[spec.index][number]
            torch.autograd.backward(roots, gradients)
            assert hidden.grad is not None
            gradient[batch] = hidden.grad
            if its_ple is not None and ple_gradient is not None and its_ple.grad is not None:
                ple_gradient[batch, :, spec.index] = its_ple.grad
            for name, (x, y) in outputs.items():
                assert y.grad is not None
                seen.setdefault(name, []).append((x.flatten(0, 1), y.grad.flatten(0, 1)))
            k, v = kv.pair
            assert k.grad is not None
            assert v.grad is not None
            if spec.is_kv_source:
                own.append((k.detach(), v.detach(), k.grad, v.grad))
            else:
                sums = kv_gradients.setdefault(spec.kv_source, [])
                if len(sums) <= number:
                    sums.append([torch.zeros_like(k), torch.zeros_like(v)])
                for total, part in zip(sums[number], (k.grad, v.grad), strict=True):
                    total += part
        for name, parts in seen.items():
            weight = weights[name]
            assert isinstance(weight, Tensor)
            x, at_output = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
            yield Linear(f"layers.{spec.index}.{name}", weight, x, at_output)
        if own:
            yield KeysValues(spec.index, *(torch.cat(pieces) for pieces in zip(*own, strict=True)))

    def _tables(self, gradient: Tensor, ple_gradient: Tensor | None) -> Iterator[Captured]:
        """The rows of the tables, and the projection of the embedding to the PLE inputs."""
        leaves = _Leaves(self.weights)
        outputs: dict[str, tuple[Tensor, Tensor]] = {}

        def apply(x: Tensor, weight: Weight, name: str) -> Tensor:
            assert isinstance(weight, Tensor)
            y = _product(x, weight.to(self._dtype))
            y.retain_grad()
            outputs[name] = x.detach(), y
            return y

        with torch.enable_grad():
            embedded = embed(leaves, self._windows, torch.float32)
            roots, gradients = [embedded], [gradient]
            ple = per_layer_inputs(leaves, self._windows, embedded, apply)
            if ple is not None and ple_gradient is not None:
                roots.append(ple)
                gradients.append(ple_gradient)
        torch.autograd.backward(roots, gradients)
        for name, (x, y) in outputs.items():
            weight = self.weights.get(name)
            assert isinstance(weight, Tensor)
            assert y.grad is not None
            yield Linear(name, weight.to(self._dtype), x.flatten(0, 1), y.grad.flatten(0, 1))
        for name, rows in leaves.found.items():
            assert rows.grad is not None
            _check_finite(rows.grad, f"the gradient at the rows of {name}", self.weights)
            yield Rows(name, self._windows.flatten(), rows.detach(), rows.grad)


class _KV(ForwardKV):
    """The K and V of one layer, with gradients."""

    def __init__(self, config: TextConfig, shared: tuple[Tensor, Tensor] | None) -> None:
        super().__init__(config)
        self.pair: list[Tensor] = []
        if shared is not None:
            self.pair = [x.detach().clone().requires_grad_() for x in shared]

    def write(self, spec: LayerSpec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep them; gradients arrive from this layer and, as roots, from those that share them."""
        k.retain_grad()
        v.retain_grad()
        self.pair = [k, v]
        return k, v

    def read(self, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        """The source's, of the forward."""
        k, v = self.pair
        return k, v


class _Leaves(Weights):
    """Weights whose looked-up rows are leaves of a graph."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.config, weights.tensors)
        self._weights = weights
        self.found: dict[str, Tensor] = {}

    def get(self, name: str) -> Weight:
        return self._weights.get(name)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        self.found[name] = self._weights.rows(name, ids).float().requires_grad_()
        return self.found[name]

    def nbytes(self, name: str) -> int:
        return self._weights.nbytes(name)


class _Borders:
    """The hidden state at every layer's border, in RAM or in a file that goes with it."""

    def __init__(self, shape: tuple[int, ...], folder: Path | None) -> None:
        if folder is None:
            self._states = torch.empty(shape)
            return
        self._file = tempfile.NamedTemporaryFile(dir=folder, prefix=".borders-")  # noqa: SIM115 - lives as long as this
        self._states = torch.from_file(self._file.name, shared=True, size=math.prod(shape)).view(shape)

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        self._states[index] = hidden

    def __getitem__(self, index: int) -> Tensor:
        return self._states[index]


def _product(x: Tensor, weight: Weight, name: str = "") -> Tensor:
    """`x @ weight.T` in the dtype of the weight, and so are the products of its backward pass; x and result in fp32."""
    assert isinstance(weight, Tensor)
    return functional.linear(x.to(weight.dtype), weight).to(x.dtype)


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def _check_finite(x: Tensor, what: str, weights: Weights) -> None:
    if not x.isfinite().all():
        raise CheckpointError(f"{what} is not finite; is there NaN or infinity in a weight?")
