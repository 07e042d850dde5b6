from epic_quant.report.blocks import Bullets, Figure, Heading, Paragraph, Table, code
from epic_quant.report.markdown import render


def test_blocks_are_parted_by_blank_lines():
    document = [Heading(2, "Title"), Paragraph("Text."), Bullets(("one", "two"))]
    assert render(document) == "## Title\n\nText.\n\n- one\n- two\n"


def test_a_figure_is_a_link_with_its_text():
    assert render([Figure("plot.svg", "what it shows", "<svg/>")]) == "![what it shows](plot.svg)\n"


def test_text_columns_are_left_and_numbers_right():
    table = Table(("a", "b", "c"), (("x", "y", "1"),), num_text_columns=2)
    cells = render([table]).splitlines()[1].strip("|").split("|")
    assert [cell.startswith(":") for cell in cells] == [True, True, False]
    assert cells[2].endswith(":")


def test_cells_are_kept_as_they_are_written():
    row = render([Table(("a", "b"), (("1e5", "0.10"),))]).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["1e5", "0.10"]


def test_a_bar_does_not_split_a_cell():
    row = render([Table(("a",), ((code("x|y"),), ("p|q",)))]).splitlines()
    assert r"`x\|y`" in row[2]
    assert r"p\|q" in row[3]


def test_markup_in_plain_text_is_harmless_and_code_is_kept():
    assert render([Paragraph("a*b <c> [d] `e*f`")]) == "a\\*b \\<c> \\[d\\] `e*f`\n"


def test_code_from_outside_stays_one_span_on_one_line():
    assert code("a`b\nc") == "`a'b c`"
