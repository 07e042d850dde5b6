"""The weight kept as it is, in two bytes: what every other scheme is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epic_quant.quant.scheme import Scheme

_MAX = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True)
class Bf16Packing:
    """Sixteen-bit codes, two bytes each in the machine's order."""

    coding = "bf16"

    def row_nbytes(self, num_codes: int) -> int:
        return 2 * num_codes

    def pack(self, codes: Tensor) -> Tensor:
        return codes.view(torch.uint8)

    def unpack(self, packed: Tensor, num_codes: int) -> Tensor:
        return packed.view(torch.uint16)


@dataclass(frozen=True)
class Bf16(Scheme):
    """Codes are the sixteen bits themselves; there is no scale."""

    scales_per_group = 0

    @property
    def num_levels(self) -> int:
        return 1 << 16

    def fit(self, groups: Tensor) -> Tensor:
        return groups.new_empty(groups.shape[0], 0)

    def encode(self, groups: Tensor, scale: Tensor) -> Tensor:
        # The clamp keeps fp32 values just below its maximum from becoming infinite.
        return groups.clamp(-_MAX, _MAX).bfloat16().view(torch.uint16)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes.view(torch.bfloat16).float()


SCHEMES = (Bf16("bf16", Bf16Packing()),)
