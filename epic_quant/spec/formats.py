"""The storage formats by name: one row each, with its properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FormatInfo:
    """A storage format of a matrix: its name in a spec, and the module of `epic_quant.quant` that implements it."""

    name: str
    module: str
    num_levels: int  # values that a weight can take at a given scale, however many bits a code is stored in
    scales_per_group: int = 1  # 2 where a group has a zero point as well; 0 where values are stored as they are

    @property
    def is_plain(self) -> bool:
        """Whether values are stored as they are, so that it takes no group, rotation or error compensation."""
        return self.scales_per_group == 0


_ROWS = (
    FormatInfo("bf16", "plain", 1 << 16, scales_per_group=0),
    FormatInfo("absmax-ternary", "absmax", 3),
    FormatInfo("absmax2", "absmax", 4),
    FormatInfo("absmax3", "absmax", 8),
    FormatInfo("absmax3-packed", "absmax", 8),
    FormatInfo("absmax4", "absmax", 16),
    FormatInfo("ternary", "ternary", 3),
    *(FormatInfo(f"int{bits}", "integer", 1 << bits) for bits in range(2, 9)),
    *(FormatInfo(f"affine{bits}", "affine", 1 << bits, scales_per_group=2) for bits in range(2, 9)),
    *(FormatInfo(f"codebook{bits}", "codebook", 1 << bits) for bits in range(2, 5)),
)
FORMATS: Mapping[str, FormatInfo] = {row.name: row for row in _ROWS}
