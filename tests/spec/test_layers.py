"""Layer numbers as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.errors import SpecError
from epic_quant.spec.layers import format_layers, parse_layers


@given(st.sets(st.integers(0, 200), min_size=1))
def test_text_and_numbers_are_inverses(layers):
    text = format_layers(layers)
    assert parse_layers(text) == sorted(layers)
    assert format_layers(parse_layers(text)) == text


def test_neighbours_are_a_range():
    assert format_layers([8, 0, 1, 2, 4, 5]) == "0-2+4-5+8"
    assert parse_layers("4+0-2") == [4, 0, 1, 2]


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1,2", "1+", "1--2", "1-2-3"])
def test_what_is_no_number_or_range_is_refused(text):
    with pytest.raises(SpecError, match="expected numbers and ranges, such as 0-5"):
        parse_layers(text)
