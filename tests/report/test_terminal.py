from hypothesis import given
from hypothesis import strategies as st

from epic_quant.report.blocks import Table
from epic_quant.report.terminal import render

TEXT = st.text(st.characters(codec="ascii", exclude_characters="`\r\n\t\x0b\x0c\x1c\x1d\x1e"), max_size=150).map(
    str.strip
)


@given(st.lists(st.tuples(TEXT, TEXT, st.integers(0, 10**9).map(str)), min_size=1, max_size=5))
def test_no_line_is_wider_than_asked(rows):
    lines = render(Table(("subject", "of", "number"), tuple(rows), num_text_columns=2), 80).splitlines()
    assert max(map(len, lines)) <= 80
    # Numbers are whole.
    assert all(line.rstrip().endswith(row[2]) for line, row in zip(lines[2:], rows, strict=True))


def test_what_fits_is_not_cut():
    assert render(Table(("a", "b"), (("`x y`", "1"),))).splitlines() == ["a    b", "---  -", "x y  1"]


def test_what_does_not_fit_ends_in_a_sign():
    assert render(Table(("a", "b"), (("x" * 60, "1"),)), 40).splitlines()[2].split()[0] == "x" * 36 + "…"
