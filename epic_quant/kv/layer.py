"""`LayerStore`: the K and V of one layer, each head whole or split into two sets of dims."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from epic_quant.errors import QuantizationError, SpecError
from epic_quant.gemma4.config import LayerSpec
from epic_quant.gemma4.rope import rotated_dims
from epic_quant.kv.rows import joined
from epic_quant.kv.segment import Segment
from epic_quant.spec import LayerKVSpec
from epic_quant.spec.kv import HeadSpec

_CHUNK_TOKENS = 4096  # taken at a time, so that a long prompt's temporaries stay small


class LayerStore:
    """Takes and gives [batch, num_kv_heads, tokens, head_dim], in `dtype`; what is not quantized is held in it too.

    Every head is stored apart, so a batch of sequences of one length is nothing but more heads. Raises SpecError where
    the spec does not fit the head.
    """

    def __init__(self, layer: LayerSpec, spec: LayerKVSpec, dtype: torch.dtype, batch_size: int = 1) -> None:
        self.tokens = 0  # that have come, those that a ring has dropped included
        self._attention, self._dtype, self._batch_size = layer.attention, dtype, batch_size
        self._k = _split(layer, spec, spec.k, dtype, batch_size)
        self._v = _split(layer, spec, spec.v, dtype, batch_size)

    @property
    def kept(self) -> int:
        """Tokens that can be read: all, on a sliding layer the newest window."""
        window = self._attention.sliding_window
        return self.tokens if window is None else min(self.tokens, window)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens, finite in fp32."""
        for splits, x in ((self._k, k), (self._v, v)):
            heads = x.flatten(0, 1)  # [batch * num_kv_heads, tokens, head_dim]
            for chunk in heads.split(_CHUNK_TOKENS, dim=1):
                for split in splits:
                    split.segment.append(joined([chunk[..., run] for run in split.runs], dim=-1).transpose(0, 1))
        self.tokens += k.shape[-2]

    def keys(self) -> Tensor:
        """The newest keys, oldest first: [batch, num_kv_heads, kept, head_dim]."""
        return self._read(self._k)

    def values(self) -> Tensor:
        """The values of the same tokens."""
        return self._read(self._v)

    def reset(self) -> None:
        """Drop all tokens."""
        self.tokens = 0
        for segment in self._segments:
            segment.reset()

    @property
    def nbytes(self) -> int:
        """Bytes stored of the tokens held."""
        return sum(segment.nbytes for segment in self._segments)

    @property
    def allocated_nbytes(self) -> int:
        """The same with the spare room of the tensors that grow."""
        return sum(segment.allocated_nbytes for segment in self._segments)

    def nbytes_after(self, tokens: int) -> int:
        """What `nbytes` of an empty store becomes with so many tokens."""
        return sum(segment.nbytes_after(tokens) for segment in self._segments)

    @property
    def _segments(self) -> list[Segment]:
        return [split.segment for split in (*self._k, *self._v)]

    def _read(self, splits: list[_DimSplit]) -> Tensor:
        by_head = self._batch_size, self._attention.num_kv_heads
        if len(splits) == 1:
            return _by_head(splits[0].segment.read(self._dtype), by_head)
        num_heads = self._batch_size * self._attention.num_kv_heads
        x = torch.empty(self.kept, num_heads, self._attention.head_dim, dtype=self._dtype)
        for runs, segment in splits:
            pieces = segment.read(self._dtype).split([run.stop - run.start for run in runs], dim=-1)
            for run, piece in zip(runs, pieces, strict=True):
                x[..., run] = piece
        return _by_head(x, by_head)


def _by_head(x: Tensor, by_head: tuple[int, int]) -> Tensor:
    """[tokens, batch * heads, dims] to [batch, heads, tokens, dims]."""
    return x.transpose(0, 1).view(*by_head, x.shape[0], x.shape[2])


class _DimSplit(NamedTuple):
    """A segment and the dims of the head that it holds, as runs: copying these is faster than picking dims."""

    runs: list[slice]
    segment: Segment


def _split(layer: LayerSpec, spec: LayerKVSpec, head: HeadSpec, dtype: torch.dtype, batch_size: int) -> list[_DimSplit]:
    splits = []
    for runs, storage in zip(_sets_of_dims(layer, len(head)), head, strict=True):
        num_dims = sum(run.stop - run.start for run in runs)
        if num_dims == 0:  # As the unrotated ones of a sliding layer.
            continue
        try:
            segment = Segment(
                storage,
                batch_size * layer.attention.num_kv_heads,
                num_dims,
                window=layer.attention.sliding_window,
                attention_sinks=spec.attention_sinks,
                residual_window=spec.residual_window,
                dtype=dtype,
            )
        except QuantizationError as error:
            misfit = f"{storage} does not fit the {num_dims} dims of layer {layer.index}'s heads"
            raise SpecError(f"{misfit}: {error}") from error
        splits.append(_DimSplit(runs, segment))
    return splits


def _sets_of_dims(layer: LayerSpec, count: int) -> list[list[slice]]:
    """All dims of a head, or the rotated ones and the others."""
    head_dim = layer.attention.head_dim
    if count == 1:
        return [[slice(0, head_dim)]]
    rotated = torch.zeros(head_dim, dtype=torch.bool)
    rotated[rotated_dims(layer.attention)] = True
    borders = [0, *(rotated.diff().nonzero().flatten() + 1).tolist(), head_dim]
    runs = [slice(*run) for run in itertools.pairwise(borders)]
    return [[run for run in runs if rotated[run.start] == which] for which in (True, False)]
