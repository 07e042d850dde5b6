"""`LayerStore`: the K and V of one layer, each head whole or in two sets of dims."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from epic_quant.errors import QuantizationError, SpecError
from epic_quant.gemma4.config import LayerSpec
from epic_quant.gemma4.rope import rotated_dims
from epic_quant.kv.part import Part
from epic_quant.kv.rows import joined
from epic_quant.kv.storage import Head, LayerPolicy

_LOT_TOKENS = 4096  # taken at a time, so that a long prompt's temporaries stay small


class LayerStore:
    """Takes and gives [num_kv_heads, tokens, head_dim], in `dtype`; what is not quantized is held in it too.

    Raises SpecError where the policy does not fit the head.
    """

    def __init__(self, spec: LayerSpec, policy: LayerPolicy, dtype: torch.dtype) -> None:
        self.tokens = 0  # that have come, those that a ring has dropped included
        self._spec, self._dtype = spec, dtype
        self._k = _head(spec, policy, policy.k, dtype)
        self._v = _head(spec, policy, policy.v, dtype)

    @property
    def kept(self) -> int:
        """Tokens that can be read: all, on a sliding layer the newest window."""
        window = self._spec.attention.sliding_window
        return self.tokens if window is None else min(self.tokens, window)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens, finite in fp32."""
        for head, x in ((self._k, k), (self._v, v)):
            for lot in x.split(_LOT_TOKENS, dim=1):
                for runs, part in head:
                    part.append(joined([lot[..., run] for run in runs], dim=-1).transpose(0, 1))
        self.tokens += k.shape[1]

    def keys(self) -> Tensor:
        """The newest keys, oldest first: [num_kv_heads, kept, head_dim]."""
        return self._read(self._k)

    def values(self) -> Tensor:
        """The values of the same tokens."""
        return self._read(self._v)

    def reset(self) -> None:
        """Forget all tokens."""
        self.tokens = 0
        for part in self._parts:
            part.reset()

    @property
    def nbytes(self) -> int:
        """Bytes stored of the tokens held."""
        return sum(part.nbytes for part in self._parts)

    @property
    def allocated_nbytes(self) -> int:
        """The same with the spare room of the tensors that grow."""
        return sum(part.allocated_nbytes for part in self._parts)

    def nbytes_after(self, tokens: int) -> int:
        """What `nbytes` of an empty store becomes with so many tokens."""
        return sum(part.nbytes_after(tokens) for part in self._parts)

    @property
    def _parts(self) -> list[Part]:
        return [part for _, part in (*self._k, *self._v)]

    def _read(self, head: list[_DimsPart]) -> Tensor:
        if len(head) == 1:
            return head[0].part.read(self._dtype).transpose(0, 1)
        x = torch.empty(self.kept, self._spec.attention.num_kv_heads, self._spec.attention.head_dim, dtype=self._dtype)
        for runs, part in head:
            pieces = part.read(self._dtype).split([run.stop - run.start for run in runs], dim=-1)
            for run, piece in zip(runs, pieces, strict=True):
                x[..., run] = piece
        return x.transpose(0, 1)


class _DimsPart(NamedTuple):
    """A part and the dims of the head that it holds, as runs: copying these is faster than picking dims."""

    runs: list[slice]
    part: Part


def _head(spec: LayerSpec, policy: LayerPolicy, head: Head, dtype: torch.dtype) -> list[_DimsPart]:
    parts = []
    for runs, storage in zip(_sets_of_dims(spec, len(head)), head, strict=True):
        num_dims = sum(run.stop - run.start for run in runs)
        if num_dims == 0:  # As the unrotated ones of a sliding layer.
            continue
        try:
            part = Part(
                storage,
                spec.attention.num_kv_heads,
                num_dims,
                window=spec.attention.sliding_window,
                first=policy.first,
                recent=policy.recent,
                dtype=dtype,
            )
        except QuantizationError as error:
            said = f"{storage} does not fit the {num_dims} dims of layer {spec.index}'s heads"
            raise SpecError(f"{said}: {error}") from error
        parts.append(_DimsPart(runs, part))
    return parts


def _sets_of_dims(spec: LayerSpec, count: int) -> list[list[slice]]:
    """All dims of a head, or the rotated ones and the others."""
    if count == 1:
        return [[slice(0, spec.attention.head_dim)]]
    rotated = torch.zeros(spec.attention.head_dim, dtype=torch.bool)
    rotated[rotated_dims(spec.attention)] = True
    borders = [0, *(rotated.diff().nonzero().flatten() + 1).tolist(), spec.attention.head_dim]
    runs = [slice(*run) for run in itertools.pairwise(borders)]
    return [[run for run in runs if rotated[run.start] == which] for which in (True, False)]
