import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.report.formatting import megabytes, milliseconds, percent, significant, times


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (math.nan, "—"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
        (0, "0"),
        (0.0, "0"),
        (1.1, "1.10"),
        (0.9996, "1.00"),
        (0.0975, "0.0975"),
        (12.34, "12.3"),
        (123.4, "123"),
        (999.6, "1,000"),
        (1234.5, "1,234"),
        (-0.5, "-0.500"),
        (0.000123, "0.000123"),
        (1.23e-7, "1.23e-07"),
    ],
)
def test_three_significant_digits(value, text):
    assert significant(value) == text


@given(st.floats(1e-30, 1e12), st.integers(1, 6))
def test_the_text_is_the_value_to_its_digits_and_never_zero(value, digits):
    read = float(significant(value, digits).replace(",", ""))
    assert read > 0
    assert math.isclose(read, value, rel_tol=0.5000001 * 10 ** (1 - digits))


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(None, "—"), (0, "0.0"), (206_974_976, "207.0"), (5_637_144_576, "5,637.1"), (12_345, "0.012"), (999_999, "1.0")],
)
def test_megabytes_have_one_decimal_and_small_ones_two_digits(nbytes, text):
    assert megabytes(nbytes) == text


def test_milliseconds():
    assert milliseconds(0.0012345) == "1.23"
    assert milliseconds(None) == "—"


@pytest.mark.parametrize(("value", "reference"), [(None, 1.0), (1.0, None), (None, None), (1.0, 0.0)])
def test_a_ratio_with_a_missing_side_is_missing(value, reference):
    assert times(value, reference) == "—"
    assert percent(value, reference) == "—"


def test_ratios():
    assert times(3.0, 2.0) == "1.50×"
    assert percent(3.0, 4.0) == "75%"
    assert times(0.0, 2.0) == "0×"
