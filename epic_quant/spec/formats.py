"""The storage formats by name: one row each, with its properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FormatInfo:
    """A storage format of a matrix: its name in a spec, and the module of `epic_quant.quant` that implements it."""

    name: str
    module: str
    num_levels: int  # codes that a weight can have, however many bits one is stored in
    scales_per_group: int = 1  # 2 where a group has a zero point as well; 0 where there are no groups to choose
    block_size: int = 1  # weights of a row that lie together in `block_nbytes` bytes; 1 where a row has no blocks
    block_nbytes: int = 0
    state_bits: tuple[int, ...] = ()  # those that a trellis can have, the first by default; its codes overlap
    is_published: bool = False  # found in published files, and not stored in here

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
    *(FormatInfo(f"trellis{bits}", "trellis", 1 << bits, state_bits=(12, 16)) for bits in range(1, 5)),
    *(FormatInfo(name, "ggml", levels, 0, size, nbytes) for name, (levels, size, nbytes) in _GGML.items()),
)
FORMATS: Mapping[str, FormatInfo] = {row.name: row for row in _ROWS}

# ggml's types that gguf-py decodes, as above; the levels of those with codebooks of vectors are those of one weight.
_GGML_PUBLISHED = {
    "q4_1": (16, 32, 20),
    "q5_1": (32, 32, 24),
    "iq4_xs": (16, 256, 136),
    "iq3_s": (16, 256, 110),
    "iq3_xxs": (16, 256, 98),
    "iq2_s": (6, 256, 82),
    "iq2_xs": (6, 256, 74),
    "iq2_xxs": (6, 256, 66),
    "iq1_m": (3, 256, 56),
    "iq1_s": (3, 256, 50),
    "mxfp4": (16, 32, 17),
    "nvfp4": (16, 64, 36),
}

_PUBLISHED_ROWS = (
    FormatInfo("f16", "plain", 1 << 16, scales_per_group=0, is_published=True),
    FormatInfo("f32", "plain", 1 << 32, scales_per_group=0, is_published=True),
    *(FormatInfo(name, "ggml", *row[:1], 0, *row[1:], is_published=True) for name, row in _GGML_PUBLISHED.items()),
    *(FormatInfo(f"ct_int{bits}", "compressed-tensors", 1 << bits, is_published=True) for bits in range(2, 9)),
    *(FormatInfo(f"ct_uint{bits}", "compressed-tensors", 1 << bits, 2, is_published=True) for bits in range(2, 9)),
    *(FormatInfo(name, "compressed-tensors", 256, is_published=True) for name in ("ct_float8", "ct_float8_block")),
    *(FormatInfo(f"gemma_int{bits}", "gemma", 1 << bits, is_published=True) for bits in (2, 4, 8)),
    *(FormatInfo(f"mlx{bits}", "MLX", 1 << bits, 2, is_published=True) for bits in (2, 3, 4, 5, 6, 8)),
)

# What only published files hold.
PUBLISHED: Mapping[str, FormatInfo] = {row.name: row for row in _PUBLISHED_ROWS}
