"""Codes to bytes and back. Every row is packed on its own, so that rows of a table can be taken apart.

`BitPacking` puts code i of a row at bits i * num_bits and up, the lowest bit first, across byte borders: eight codes
take exactly `num_bits` bytes. `TritPacking` writes five base-3 digits a byte (3^5 = 243), the first as the lowest.
What is left over in a row's last byte is zero.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Packing(Protocol):
    """How a row of codes is laid out in bytes."""

    @property
    def coding(self) -> str:
        """Its name in the kernels."""
        ...

    def row_nbytes(self, num_codes: int) -> int:
        """Bytes that a row of `num_codes` codes takes."""
        ...

    def pack(self, codes: Tensor) -> Tensor:
        """[rows, num_codes] uint8 to [rows, row_nbytes] uint8."""
        ...

    def unpack(self, packed: Tensor, num_codes: int) -> Tensor:
        """The inverse of `pack`: [rows, row_nbytes] uint8 to [rows, num_codes] uint8."""
        ...


@dataclass(frozen=True)
class BitPacking:
    """Codes below 2^num_bits, 1 to 8 bits wide, with no bit between them."""

    num_bits: int

    @property
    def coding(self) -> str:
        return f"bits{self.num_bits}"

    def row_nbytes(self, num_codes: int) -> int:
        return -(-num_codes * self.num_bits // 8)

    def pack(self, codes: Tensor) -> Tensor:
        rows, num_codes = codes.shape
        units = _pad_to_multiple(codes, self._unit_codes).view(rows, -1, self._unit_codes)
        packed = torch.zeros(rows, units.shape[1], self._unit_nbytes, dtype=torch.uint8, device=codes.device)
        for code, byte, shift in self._overlaps():
            packed[:, :, byte] |= _shift_left(units[:, :, code], shift)
        return packed.view(rows, -1)[:, : self.row_nbytes(num_codes)].contiguous()

    def unpack(self, packed: Tensor, num_codes: int) -> Tensor:
        rows = packed.shape[0]
        units = _pad_to_multiple(packed, self._unit_nbytes).view(rows, -1, self._unit_nbytes)
        codes = torch.zeros(rows, units.shape[1], self._unit_codes, dtype=torch.uint8, device=packed.device)
        for code, byte, shift in self._overlaps():
            codes[:, :, code] |= _shift_left(units[:, :, byte], -shift)
        codes &= (1 << self.num_bits) - 1
        return codes.view(rows, -1)[:, :num_codes]

    @property
    def _unit_codes(self) -> int:
        """Codes in the shortest run that fills whole bytes."""
        return 8 // math.gcd(8, self.num_bits)

    @property
    def _unit_nbytes(self) -> int:
        return self.num_bits // math.gcd(8, self.num_bits)

    def _overlaps(self) -> list[tuple[int, int, int]]:
        """(code, byte, left shift from code to byte) for every pair in a unit that shares a bit."""
        return [
            (code, byte, code * self.num_bits - 8 * byte)
            for code in range(self._unit_codes)
            for byte in range(self._unit_nbytes)
            if -self.num_bits < code * self.num_bits - 8 * byte < 8
        ]


@dataclass(frozen=True)
class TritPacking:
    """Codes 0, 1, 2, five a byte: 1.6 bits a code where log2 3 = 1.585 is the least possible."""

    coding = "trits"

    def row_nbytes(self, num_codes: int) -> int:
        return -(-num_codes // 5)

    def pack(self, codes: Tensor) -> Tensor:
        units = _pad_to_multiple(codes, 5).view(codes.shape[0], -1, 5)
        packed = units[:, :, 4].clone()
        for digit in (3, 2, 1, 0):
            packed = packed.mul_(3).add_(units[:, :, digit])
        return packed

    def unpack(self, packed: Tensor, num_codes: int) -> Tensor:
        trits = _trits_of_bytes().to(packed.device).index_select(0, packed.reshape(-1).int())
        return trits.view(packed.shape[0], -1)[:, :num_codes]


@functools.cache
def _trits_of_bytes() -> Tensor:
    """[256, 5]: a table, since integer division by powers of three is slow."""
    return torch.arange(256).unsqueeze(1).div(3 ** torch.arange(5), rounding_mode="floor").remainder(3).to(torch.uint8)


def _shift_left(x: Tensor, shift: int) -> Tensor:
    return x << shift if shift >= 0 else x >> -shift


def _pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % multiple)).contiguous()
