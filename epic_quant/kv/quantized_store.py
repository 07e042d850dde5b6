"""`QuantizedStore`: the quantized tokens of a segment, in units of one token, or of a block that shares scales."""

from __future__ import annotations

import torch
from torch import Tensor

from epic_quant.errors import QuantizationError
from epic_quant.kv.rows import Rows, joined
from epic_quant.kv.transforms import Center, Clip, Directions, Hadamard, Transform
from epic_quant.quant import GroupedMatrix, format_named, hadamard, quantize, resolved
from epic_quant.quant.grouped import MAX_ROTATED
from epic_quant.quant.scales import over_scale, stored_scale
from epic_quant.spec import KVStorageSpec, WeightSpec

# Read together where there is something to do to them in fp32, which then stays in the caches.
_CHUNK_TOKENS = 1024


class QuantizedStore:
    """Takes and gives [tokens, num_heads, num_dims]; keeps at most `most` units, the newest.

    The first `padding` places of the first block are of tokens that are kept elsewhere. They hold the token after them,
    since the attention sinks, unlike all other tokens, would widen the block's range.

    Values go through a chain of transforms, fitted to the first units that hold as many tokens as the center asks for
    (a ring takes no more of them than it holds); the coordinates along principal directions are then stored apart.

    Raises QuantizationError where the groups do not divide the dims, or directions leave none of them.
    """

    def __init__(
        self, spec: KVStorageSpec, num_heads: int, num_dims: int, block: int | None, most: int | None, padding: int
    ) -> None:
        self.unit, self.most, self.padding = block or 1, most, padding
        # Units that the store begins with, at least.
        self.least = -(-(spec.center_tokens or 1) // self.unit)
        if most is not None:
            self.least = max(1, min(self.least, most))
        self._chain: list[Transform] = [] if spec.center_tokens is None else [Center(num_heads, num_dims)]
        formats, self._num_coordinates = [spec.format], [num_dims]
        if spec.pca is not None:
            if spec.pca.directions >= num_dims:
                raise QuantizationError(f"{spec.pca.directions} directions leave nothing of {num_dims} dims")
            self._chain.append(Directions(num_heads, spec.pca.directions, num_dims))
            formats = [spec.pca.format, spec.format]
            self._num_coordinates = [spec.pca.directions, num_dims - spec.pca.directions]
        self._shape, self._is_fitted = (num_heads, num_dims), False
        self._coordinates = [
            _Coordinates(name, spec, num_heads, count, block, most)
            for name, count in zip(formats, self._num_coordinates, strict=True)
        ]

    @property
    def unit_nbytes(self) -> int:
        """Bytes of one unit."""
        return sum(rows.row_nbytes for part in self._coordinates for rows in part.rows)

    @property
    def fixed_nbytes(self) -> int:
        """Bytes that a store with any units has beside them: what its transforms have fitted."""
        return sum(rows.row_nbytes for transform in self._chain for rows in transform.stored())

    def rows(self) -> list[Rows]:
        """Bytes of everything stored."""
        fitted = [rows for transform in self._chain for rows in transform.stored()]
        return [*(rows for part in self._coordinates for rows in part.rows), *fitted]

    def reset(self) -> None:
        """Drop everything; allocated memory is kept."""
        self._is_fitted = False
        for rows in self.rows():
            rows.drop(len(rows))

    def append(self, x: Tensor) -> None:
        """Quantize tokens x [tokens, num_heads, num_dims] that fill whole units, with the padding the first time.

        Those that a ring would drop at once are not stored.
        """
        # Beyond these limits scales saturate anyway, and the sums of a mean or a rotation must not overflow.
        values = x.float().clamp(-MAX_ROTATED, MAX_ROTATED)
        if not self._is_fitted:
            begin = values[: self.least * self.unit - self.padding]
            for transform in self._chain:
                begin = transform.fit(begin)
            self._is_fitted = True
        if self.padding and not self._num_units:
            values = torch.cat([values[:1].expand(self.padding, -1, -1), values])
        if self.most is not None:
            values = values[max(0, len(values) - self.most * self.unit) :]
        if not len(values):
            return
        for transform in self._chain:
            values = transform.apply(values)
        for part, its in zip(self._coordinates, values.split(self._num_coordinates, dim=-1), strict=True):
            part.append(its)

    def read(self, dtype: torch.dtype) -> Tensor:
        """All tokens without the padding, in `dtype`."""
        if not self._chain or not self._is_fitted:
            return self._coordinates[0].read(slice(None), dtype)[self.padding :].to(dtype)
        x = torch.empty(self._num_units * self.unit, *self._shape, dtype=dtype)
        step = -(-_CHUNK_TOKENS // self.unit)
        for first in range(0, self._num_units, step):
            units = slice(first, first + step)
            values = joined([part.read(units, torch.float32) for part in self._coordinates], dim=-1)
            for transform in reversed(self._chain):
                values = transform.invert(values)
            x[first * self.unit :][: len(values)] = values
        return x[self.padding :]

    @property
    def _num_units(self) -> int:
        return len(self._coordinates[0].rows[0])


class _Coordinates:
    """Some of the coordinates of heads, quantized in one format.

    A quantized row is a token's, or that of a coordinate over a block of tokens.
    """

    def __init__(
        self, format_name: str, spec: KVStorageSpec, num_heads: int, count: int, block: int | None, most: int | None
    ) -> None:
        self._shape, self._block, self._unbiased = (num_heads, count), block, spec.unbiased
        self._clip = None if spec.clip_percent is None else Clip(spec.clip_percent / 100)
        rotated = hadamard.block_for(count, spec.hadamard_block)
        # A token's row is rotated as it is quantized; what a block or a clip comes between is rotated before.
        rotated_apart = rotated if block is not None or self._clip is not None else 0
        self._hadamard = Hadamard(rotated_apart) if rotated_apart else None
        self._cols = block or count
        weight_spec = WeightSpec(format_name, spec.group_size, 0 if rotated_apart else rotated)
        self._spec = resolved(weight_spec, self._cols)
        num_rows = num_heads if block is None else num_heads * count
        layout = format_named(format_name).layout(self._spec, (num_rows, self._cols))
        self.rows = [Rows(tuple(shape), dtype, most) for dtype, shape in (layout["packed"], layout["scale"])]

    def append(self, values: Tensor) -> None:
        """Quantize [tokens, num_heads, count], fp32, of whole units."""
        if self._hadamard is not None:
            values = self._hadamard.apply(values)
        if self._block is not None:
            values = values.unflatten(0, (-1, self._block)).permute(0, 2, 3, 1)  # [units, heads, count, block]
        rows = values.reshape(-1, self._cols)
        if self._clip is not None:
            rows = self._clip.apply(rows)
        stored = quantize(rows, self._spec)
        assert isinstance(stored, GroupedMatrix)
        scale = _unbiased_scale(stored, rows) if self._unbiased else stored.scale
        for its, made in zip(self.rows, (stored.packed, scale), strict=True):
            its.append(made.view(-1, *its.shape))

    def read(self, units: slice, dtype: torch.dtype) -> Tensor:
        """Tokens of some units, [tokens, num_heads, count] in `dtype`, or where they are rotated here in fp32."""
        packed, scale = (rows.rows()[units].flatten(0, 1) for rows in self.rows)
        stored = GroupedMatrix(packed, scale, self._cols, self._spec)
        values = stored.dequantize(dtype if self._hadamard is None else torch.float32)
        if self._block is not None:
            # [units, heads, count, block] to [units, block, heads, count]
            values = values.view(-1, *self._shape, self._block).permute(0, 3, 1, 2)
        values = values.reshape(-1, *self._shape)
        return values if self._hadamard is None else self._hadamard.invert(values)


def _unbiased_scale(stored: GroupedMatrix, rows: Tensor) -> Tensor:
    """The scale of each row with which <row, row as read> = <row, row>."""
    rows = rows.clamp(-(2.0**30), 2.0**30)  # Beyond, scales saturate anyway, and squares must not overflow.
    norm, product = (torch.linalg.vecdot(rows, other).unsqueeze(1) for other in (rows, stored.dequantize()))
    return stored_scale(stored.scale * over_scale(norm, product))
