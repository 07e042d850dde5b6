"""The compiled part of this package. It trusts its callers: addresses and sizes are not checked."""

from collections.abc import Sequence

def isas() -> list[str]: ...
def threads_of() -> str: ...
def sum_of_words(words: int, count: int, num_threads: int, /) -> int: ...

class Format:
    """Raises ValueError for a format that no kernel knows."""

    def __init__(
        self,
        coding: str,
        levels: Sequence[int],
        rounding: int,
        divisor: float,
        gaussian_step: float,
        peak_level: float,
        either_sign: bool,
        /,
        state_bits: int = 0,
        multiplier: int = 0,
    ) -> None: ...
    @property
    def block_cols(self) -> int:
        """Columns of a block that holds its scales; 0 where they are kept apart."""
    @property
    def group_cols(self) -> int:
        """Columns of such a block that share a scale."""
    def row_nbytes(self, cols: int, /) -> int: ...

class Matrix:
    """Raises ValueError for an instruction set without kernels here."""

    def __init__(
        self,
        isa: str,
        format: Format,
        hadamard_block: int,
        signs: int,
        rows: int,
        cols: int,
        num_scales: int,
        packed: int,
        scale: int,
        /,
    ) -> None: ...
    @property
    def has_matmul(self) -> bool: ...
    def matmul(self, x: int, tokens: int, out: int, int8: bool, num_threads: int, /) -> None: ...
    def quantize(self, element: int, weight: int, num_threads: int, /) -> int: ...
    def dequantize(self, element: int, weight: int, rotated: bool, num_threads: int, /) -> None: ...

def rotate(
    isa: str,
    hadamard_block: int,
    signs: int,
    inverse: bool,
    rows: int,
    cols: int,
    source: int,
    to: int,
    num_threads: int,
    /,
) -> None: ...
def find_paths(
    isa: str,
    bits: int,
    state_bits: int,
    values: int,
    x: int,
    rows: int,
    cols: int,
    before: int,
    ends: bool,
    keep: int,
    states: int,
    num_threads: int,
    /,
) -> None: ...
def find_compensated_paths(
    isa: str,
    bits: int,
    state_bits: int,
    values: int,
    x: int,
    scales: int,
    rows: int,
    cols: int,
    factor: int,
    own_factors: int,
    over_diagonal: int,
    before: int,
    ends: bool,
    most: int,
    keep: int,
    states: int,
    num_threads: int,
    /,
) -> None: ...
