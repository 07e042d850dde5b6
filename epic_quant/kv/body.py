"""`Body`: the quantized tokens of a part, in units of one token, or of a whole block where channels share scales."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from epic_quant.errors import QuantizationError
from epic_quant.kv import principal
from epic_quant.kv.rows import Rows, joined
from epic_quant.kv.storage import Storage
from epic_quant.quant import QuantizedTensor, Quantizer, hadamard
from epic_quant.quant.base import MAX_ROTATED
from epic_quant.quant.scheme import SCALE_DTYPE, over_scale, stored_scale

# Read together where there is something to do to them in fp32, which then stays in the caches.
_LOT_TOKENS = 1024


class Body:
    """Takes and gives [tokens, num_heads, num_dims]; keeps at most `most` units, the newest.

    The first `lead` places of the first block are of tokens that are kept elsewhere. They hold the token after them,
    since the first tokens of a text, which draw attention, are unlike all others and would widen the block's range.

    With `center`, the mean of the first units that hold so many tokens, for every head and channel, is taken off before
    quantizing and put back on reading. A ring takes no more of them than it holds. With `pca`, heads are then turned
    towards the directions in which those tokens vary most, and the coordinates along these are stored apart.

    Raises QuantizationError where the storage's groups do not divide the dims, or directions leave none of them.
    """

    def __init__(
        self, storage: Storage, num_heads: int, num_dims: int, block: int | None, most: int | None, lead: int
    ) -> None:
        assert isinstance(storage.how, Quantizer)
        self.unit, self.most, self.lead = block or 1, most, lead
        # Units that the body begins with, at least.
        self.least = -(-(storage.center or 1) // self.unit)
        if most is not None:
            self.least = max(1, min(self.least, most))
        self._centered, how, directions = storage.center is not None, [storage.how], 0
        if storage.pca is not None:
            directions, how = storage.pca.directions, [replace(storage.how, scheme=storage.pca.scheme), storage.how]
            if directions >= num_dims:
                raise QuantizationError(f"{directions} directions leave nothing of {num_dims} dims")
        # Of one row each, once they are known.
        self._offset = Rows((num_heads, num_dims), SCALE_DTYPE)
        self._reflectors = Rows((num_heads, directions, num_dims), SCALE_DTYPE)
        self._num_coordinates = [directions, num_dims - directions] if directions else [num_dims]
        self._coordinates = [
            _Coordinates(quantizer, storage, num_heads, count, block, most)
            for quantizer, count in zip(how, self._num_coordinates, strict=True)
        ]

    @property
    def unit_nbytes(self) -> int:
        """Bytes of one unit."""
        return sum(rows.row_nbytes for part in self._coordinates for rows in part.rows)

    @property
    def fixed_nbytes(self) -> int:
        """Bytes that a body with any units has beside them."""
        return self._offset.row_nbytes + self._reflectors.row_nbytes if self._centered else 0

    def rows(self) -> list[Rows]:
        """All that is stored."""
        return [*(rows for part in self._coordinates for rows in part.rows), self._offset, self._reflectors]

    def append(self, x: Tensor) -> None:
        """Quantize tokens x [tokens, num_heads, num_dims] that fill whole units, together with the lead the first time.

        Those that a ring would drop at once are not stored.
        """
        # Beyond that scales saturate anyway, and the sums of a mean or a turn must not overflow.
        values = x.float().clamp(-MAX_ROTATED, MAX_ROTATED)
        if self._centered and not len(self._offset):
            begin = values[: self.least * self.unit - self.lead]
            self._offset.append(stored_scale(begin.mean(dim=0, keepdim=True)))
            if directions := self._reflectors.shape[1]:
                found = principal.reflectors(begin - self._offset.rows(), directions, SCALE_DTYPE)
                self._reflectors.append(found.unsqueeze(0))
        if self.lead and not self._num_units:
            values = torch.cat([values[:1].expand(self.lead, -1, -1), values])
        if self.most is not None:
            values = values[max(0, len(values) - self.most * self.unit) :]
        if not len(values):
            return
        if len(self._offset):
            values = values - self._offset.rows()
        if len(self._reflectors):
            values = principal.rotate(values, self._reflectors.rows()[0])
        for part, its in zip(self._coordinates, values.split(self._num_coordinates, dim=-1), strict=True):
            part.append(its)

    def read(self, dtype: torch.dtype) -> Tensor:
        """All tokens without the lead, in `dtype`."""
        if not len(self._offset):
            return self._coordinates[0].read(slice(None), dtype)[self.lead :].to(dtype)
        x = torch.empty(self._num_units * self.unit, *self._offset.shape, dtype=dtype)
        step = -(-_LOT_TOKENS // self.unit)
        for first in range(0, self._num_units, step):
            units = slice(first, first + step)
            values = joined([part.read(units, torch.float32) for part in self._coordinates], dim=-1)
            if len(self._reflectors):
                values = principal.unrotate(values, self._reflectors.rows()[0])
            values += self._offset.rows()
            x[first * self.unit :][: len(values)] = values
        return x[self.lead :]

    @property
    def _num_units(self) -> int:
        return len(self._coordinates[0].rows[0])


class _Coordinates:
    """Some of the coordinates of heads, quantized under one scheme.

    Rows of the quantizer are a token's, or those of a coordinate over a block of tokens.
    """

    def __init__(
        self, quantizer: Quantizer, storage: Storage, num_heads: int, count: int, block: int | None, most: int | None
    ) -> None:
        self._shape, self._block = (num_heads, count), block
        self._clipped, self._unbiased = (storage.clip or 0) / 100, storage.unbiased
        turned = hadamard.block_for(count, quantizer.hadamard_block)
        # A row of a token is turned by the quantizer; a block's, or one that is clipped after it, is turned here.
        self._turned = turned if block is not None or self._clipped else 0
        self._quantizer = replace(quantizer, hadamard_block=0 if self._turned else turned)
        self._cols = block or count
        num_rows = num_heads if block is None else num_heads * count
        packed, scales = _row_shape(self._quantizer, self._cols)
        self._packed = Rows((num_rows, packed), torch.uint8, most)
        self._scale = Rows((num_rows, scales), SCALE_DTYPE, most)

    @property
    def rows(self) -> list[Rows]:
        """What is stored of units."""
        return [self._packed, self._scale]

    def append(self, values: Tensor) -> None:
        """Quantize [tokens, num_heads, count], fp32, of whole units."""
        if self._turned:
            values = hadamard.rotate(values, self._turned)
        if self._block is not None:
            values = values.unflatten(0, (-1, self._block)).permute(0, 2, 3, 1)  # [units, heads, count, block]
        rows = values.reshape(-1, self._cols)
        if self._clipped:
            rows = _clipped(rows, self._clipped)
        stored = self._quantizer.quantize(rows)
        scale = _unbiased_scale(stored, rows) if self._unbiased else stored.scale
        self._packed.append(stored.packed.view(-1, *self._packed.shape))
        self._scale.append(scale.view(-1, *self._scale.shape))

    def read(self, units: slice, dtype: torch.dtype) -> Tensor:
        """Tokens of some units, [tokens, num_heads, count] in `dtype`, or where they are turned here in fp32."""
        packed, scale = (rows.rows()[units].flatten(0, 1) for rows in self.rows)
        stored = QuantizedTensor(packed, scale, self._cols, self._quantizer)
        values = stored.dequantize(torch.float32 if self._turned else dtype)
        if self._block is not None:
            # [units, heads, count, block] to [units, block, heads, count]
            values = values.view(-1, *self._shape, self._block).permute(0, 3, 1, 2)
        values = values.reshape(-1, *self._shape)
        return hadamard.unrotate(values, self._turned) if self._turned else values


def _clipped(rows: Tensor, part: float) -> Tensor:
    """Each row with the outer part of its range, at either end, moved to where that begins."""
    least, largest = rows.aminmax(dim=1, keepdim=True)
    low, high = ((1 - part) * end + part * other for end, other in ((least, largest), (largest, least)))
    return rows.clamp(low, high)


def _unbiased_scale(stored: QuantizedTensor, rows: Tensor) -> Tensor:
    """The scale of each row with which <row, row as read> = <row, row>."""
    rows = rows.clamp(-(2.0**30), 2.0**30)  # Beyond, scales saturate anyway, and squares must not overflow.
    norm, product = (torch.linalg.vecdot(rows, other).unsqueeze(1) for other in (rows, stored.dequantize()))
    return stored_scale(stored.scale * over_scale(norm, product))


@functools.cache
def _row_shape(quantizer: Quantizer, cols: int) -> tuple[int, int]:
    """Bytes and scales of a row, read off one that is really quantized."""
    stored = quantizer.quantize(torch.zeros(1, cols))
    return stored.packed.shape[1], stored.scale.shape[1]
