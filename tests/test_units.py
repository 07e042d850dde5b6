import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.units import parse_nbytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("3.5GB", 3_500_000_000),
        ("800 MiB", 800 * 2**20),
        ("6g", 6_000_000_000),
        ("1.5e9", 1_500_000_000),
        ("1e3kB", 1_000_000),
        (".5KiB", 512),
        ("7B", 7),
        (" 41000 ", 41_000),
        ("1TB", 10**12),
        ("0", 0),
    ],
)
def test_sizes_are_read_with_their_unit(text, nbytes):
    assert parse_nbytes(text) == nbytes


@given(st.integers(0, 10**18))
def test_whole_bytes_are_exact(nbytes):
    assert parse_nbytes(str(nbytes)) == nbytes


@pytest.mark.parametrize("text", ["", "much", "3.5XB", "-1GB", "nan", "1e", "1,5GB", "i", "1iB", "1e999"])
def test_what_is_no_size_is_reported(text):
    with pytest.raises(ValueError, match="is no number of bytes"):
        parse_nbytes(text)
