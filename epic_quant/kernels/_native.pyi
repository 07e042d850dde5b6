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
