"""Where a block keeps its numbers: fields that are read from, and written into, blocks [n, block bytes] uint8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from epic_quant.quant.scales import SCALE_DTYPE


class Field(Protocol):
    """Small numbers of a block, as uint8."""

    def read(self, blocks: Tensor) -> Tensor:
        """Blocks to [n, numbers] uint8."""
        ...

    def write(self, blocks: Tensor, numbers: Tensor) -> None:
        """The inverse, into blocks whose bits for it are zero."""
        ...


@dataclass(frozen=True)
class Bits:
    """The `width` bits from bit `place` up of every number, in `nbytes` bytes from `start` on.

    The bytes are taken `stride` at a time: the lowest bits of those hold `stride` numbers, the next bits the next ones.
    """

    start: int
    nbytes: int
    width: int
    stride: int
    place: int = 0

    def read(self, blocks: Tensor) -> Tensor:
        held = blocks[:, self.start : self.start + self.nbytes].unflatten(1, (-1, 1, self.stride))
        numbers: Tensor = (held >> self._shifts(blocks) & self._mask) << self.place
        return numbers.flatten(1)

    def write(self, blocks: Tensor, numbers: Tensor) -> None:
        bits = (numbers >> self.place & self._mask).unflatten(1, (-1, 8 // self.width, self.stride))
        held = (bits << self._shifts(blocks)).sum(2, dtype=torch.uint8)  # no two have a bit in common
        blocks[:, self.start : self.start + self.nbytes] |= held.flatten(1)

    @property
    def _mask(self) -> int:
        return (1 << self.width) - 1

    def _shifts(self, blocks: Tensor) -> Tensor:
        return torch.arange(0, 8, self.width, dtype=torch.uint8, device=blocks.device).unsqueeze(1)


@dataclass(frozen=True)
class Joined:
    """Numbers whose bits lie in several places."""

    parts: tuple[Bits, ...]

    def read(self, blocks: Tensor) -> Tensor:
        first, *others = (part.read(blocks) for part in self.parts)
        for other in others:
            first |= other
        return first

    def write(self, blocks: Tensor, numbers: Tensor) -> None:
        for part in self.parts:
            part.write(blocks, numbers)


@dataclass(frozen=True)
class Signed:
    """Bytes in two's complement, as value + 128."""

    bits: Bits

    def read(self, blocks: Tensor) -> Tensor:
        return self.bits.read(blocks) ^ 128

    def write(self, blocks: Tensor, numbers: Tensor) -> None:
        self.bits.write(blocks, numbers ^ 128)


@dataclass(frozen=True)
class EightPairs:
    """Eight scales and then eight minima of 6 bits, in 12 bytes from `start` on.

    The low 6 bits of bytes 0 to 3 are scales 0 to 3, those of bytes 4 to 7 minima 0 to 3. Bytes 8 to 11 have the low 4
    bits of scales 4 to 7 in their low halves and those of minima 4 to 7 in their high ones; the 2 bits above are the
    top bits of bytes 0 to 3 and 4 to 7.
    """

    start: int

    def read(self, blocks: Tensor) -> Tensor:
        scales, minima, halves = blocks[:, self.start : self.start + 12].split(4, dim=1)
        late_scales, late_minima = halves & 15 | scales >> 6 << 4, halves >> 4 | minima >> 6 << 4
        return torch.cat([scales & 63, late_scales, minima & 63, late_minima], dim=1)

    def write(self, blocks: Tensor, numbers: Tensor) -> None:
        scales, late_scales, minima, late_minima = numbers.split(4, dim=1)
        held = [scales | late_scales >> 4 << 6, minima | late_minima >> 4 << 6, late_scales & 15 | late_minima << 4]
        blocks[:, self.start : self.start + 12] = torch.cat(held, dim=1)


@dataclass(frozen=True)
class Trits:
    """Base-3 digits, as in `tq1_0`: 32 bytes of five, 16 of five and 4 of four.

    A byte is a fraction of 256, rounded up, so that each multiplication by 3 brings the next digit above the byte. The
    first digits of a section's bytes come first, then the second ones.
    """

    sections = ((0, 32, 5), (32, 16, 5), (48, 4, 4))

    def read(self, blocks: Tensor) -> Tensor:
        digits = []
        for start, nbytes, count in self.sections:
            rest = blocks[:, start : start + nbytes]
            for _ in range(count):
                digits.append((rest.short() * 3 >> 8).to(torch.uint8))
                rest = rest * 3  # in uint8, which drops the digit
        return torch.cat(digits, dim=1)

    def write(self, blocks: Tensor, numbers: Tensor) -> None:
        parts = numbers.int().split([nbytes * count for _, nbytes, count in self.sections], dim=1)
        for part, (start, nbytes, count) in zip(parts, self.sections, strict=True):
            weights = torch.tensor([[81], [27], [9], [3], [1]][:count], dtype=torch.int32, device=blocks.device)
            value = (part.unflatten(1, (count, nbytes)) * weights).sum(1, dtype=torch.int32)
            blocks[:, start : start + nbytes] = ((value * 256 + 242) // 243).to(torch.uint8)


def read_fp16(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at a byte of every block: [n, 1] fp32."""
    # contiguous() does nothing for a single block, which may then begin at an odd byte.
    return blocks[:, start : start + 2].clone(memory_format=torch.contiguous_format).view(SCALE_DTYPE).float()


def write_fp16(blocks: Tensor, start: int, numbers: Tensor) -> None:
    """The inverse; `numbers` [n] fp32 that fp16 has."""
    blocks[:, start : start + 2] = numbers.to(SCALE_DTYPE).unsqueeze(1).view(torch.uint8)
