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
    scales_per_group: int = 1  # 2 where a group has a zero point as well; 0 where there are no groups to choose
    block_size: int = 1  # weights of a row that lie together in `block_nbytes` bytes; 1 where a row has no blocks
    block_nbytes: int = 0

    @property
    def has_groups(self) -> bool:
        """Whether it takes a group, rotation and error compensation."""
        return self.scales_per_group > 0

    @property
    def is_plain(self) -> bool:
        """Whether values are stored as they are."""
        return not self.has_groups and self.block_size == 1


# ggml's types: levels, and the weights and bytes of a block, gguf-py's GGML_QUANT_SIZES.
_GGML = {
    "q8_0": (256, 32, 34),
    "q6_k": (64, 256, 210),
    "q5_k": (32, 256, 176),
    "q4_k": (16, 256, 144),
    "q3_k": (8, 256, 110),
    "q2_k": (4, 256, 84),
    "q5_0": (32, 32, 22),
    "q4_0": (16, 32, 18),
    "iq4_nl": (16, 32, 18),
    "tq2_0": (3, 256, 66),
    "tq1_0": (3, 256, 54),
}

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
    *(FormatInfo(name, "ggml", levels, 0, size, nbytes) for name, (levels, size, nbytes) in _GGML.items()),
)
FORMATS: Mapping[str, FormatInfo] = {row.name: row for row in _ROWS}
