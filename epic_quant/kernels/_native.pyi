"""The compiled part of this package. It trusts its callers: addresses and sizes are not checked."""

def isas() -> list[str]: ...
def threads_of() -> str: ...
def sum_of_words(words: int, count: int, num_threads: int, /) -> int: ...

class Matrix:
    def __init__(
        self,
        isa: str,
        packed: int,
        scale: int,
        rows: int,
        cols: int,
        row_nbytes: int,
        num_scales: int,
        coding: int,
        zero: int,
        levels: bytes,
        /,
    ) -> None: ...
    def linear(self, x: int, tokens: int, out: int, int8: bool, num_threads: int, /) -> None: ...

class Scheme:
    def __init__(
        self,
        rounding: int,
        low: float,
        high: float,
        divisor: float,
        gaussian_step: float,
        peak_level: float,
        either_sign: bool,
        packed_bits: int,
        levels: list[float],
        thresholds: list[float],
        /,
    ) -> None: ...

def quantize(
    isa: str,
    scheme: Scheme,
    group_size: int,
    block: int,
    signs: int,
    rows: int,
    cols: int,
    element: int,
    weight: int,
    packed: int,
    scale: int,
    num_threads: int,
    /,
) -> int: ...
def dequantize(
    isa: str,
    scheme: Scheme,
    group_size: int,
    block: int,
    signs: int,
    rows: int,
    cols: int,
    element: int,
    weight: int,
    packed: int,
    scale: int,
    num_threads: int,
    /,
) -> None: ...
def turn(
    isa: str, block: int, signs: int, back: bool, rows: int, cols: int, source: int, to: int, num_threads: int, /
) -> None: ...
