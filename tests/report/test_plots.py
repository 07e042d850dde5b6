import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import matplotlib
import pytest

from epic_quant.errors import ReportError
from epic_quant.report import plots
from epic_quant.report.formatting import significant
from epic_quant.report.palette import contrast
from epic_quant.report.plots import Axis, Line, Point, Scatter, draw_scatter

POINTS = [Point(panel, series, 2.0 + index, 0.4 / (1 + index)) for panel in "ab" for index, series in enumerate("xyz")]
X, Y = Axis("bits", lambda value: f"{significant(value)} bits"), Axis("error", significant)
FRONT = Line("front", [(1.0, 0.5), (2.0, 0.1)], names=("x", "y"))
FLOOR = Line("floor", [(1.0, 0.01), (9.0, 0.01)], dashed=True)
DRAWINGS = {
    "points": lambda points: plots.scatter_svg(Scatter(X, Y, points)),
    "points with lines": lambda points: plots.scatter_svg(Scatter(X, Y, points, lines=[FRONT, FLOOR])),
    "joined points with a bound and marks": lambda points: plots.scatter_svg(
        Scatter(replace(X, shared=False), replace(Y, log=False, limits=(0, 9)), points, (), points[:1], True, "z")
    ),
    "heat map": lambda points: plots.heat_map_svg([plots.Cell(p.panel, p.series, "column", p.y) for p in points]),
}


def seen(axes):
    """The lines of a plot but for the places of its tips."""
    return [line for line in axes.lines if line.get_gid() is None]


@pytest.fixture(params=DRAWINGS.values(), ids=DRAWINGS)
def draw(request):
    return request.param


def test_a_plot_is_an_svg_with_a_white_ground(draw):
    root = ElementTree.fromstring(draw(POINTS))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    ground = root[0]
    assert ground.attrib["fill"] == "#ffffff"
    _, _, width, height = root.attrib["viewBox"].split()
    assert re.findall(r"[\d.]+", ground.attrib["d"]) == ["0", height, width, height, width, "0", "0", "0"]


def test_a_plot_is_the_same_each_time_whatever_the_users_settings(draw):
    first = draw(POINTS)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "path"}):
        assert draw(POINTS) == first


def test_a_plot_says_no_date(draw):
    assert "<dc:date>" not in draw(POINTS)


@pytest.mark.parametrize("points", [POINTS[:1], [Point("p", "$a_b$", 1e-3, 1e4)], [Point("<&>", "s", 4.0, 0.1)]])
def test_one_point_and_strange_names_are_drawn(draw, points):
    ElementTree.fromstring(draw(points))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("log", [False, True])
def test_points_lie_where_their_values_are_and_are_all_seen(joined, log):
    points = [*POINTS, Point("b", "x", 1.0, 0.9)]
    with plots.style():
        figure = draw_scatter(Scatter(X, replace(Y, log=log), points, joined=joined))
    for axes, panel in zip(figure.axes, "ab", strict=True):
        assert axes.get_title("left") == panel
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log" if log else "linear")
        drawn = {(line.get_label(), x, y) for line in seen(axes) for x, y in zip(*line.get_data(), strict=True)}
        assert drawn == {(point.series, point.x, point.y) for point in points if point.panel == panel}
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert all(left < x < right and bottom < y < top for _, x, y in drawn)
    (line,) = (line for line in seen(figure.axes[1]) if line.get_label() == "x")
    assert (line.get_linestyle() == "-") is joined
    assert list(line.get_xdata()) == ([1.0, 2.0] if joined else [2.0, 1.0])


def test_lines_lie_where_they_are_in_every_panel_and_name_their_points():
    with plots.style():
        figure = draw_scatter(Scatter(X, Y, POINTS, lines=[FRONT, FLOOR]))
    for axes in figure.axes:
        lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in seen(axes)}
        assert (lines["front"], lines["floor"]) == (FRONT.points, FLOOR.points)
        assert [(text.get_text(), text.xy) for text in axes.texts] == [("x", (1.0, 0.5)), ("y", (2.0, 0.1))]
        assert axes.get_ylim()[0] < 0.01


def test_a_bound_is_a_dashed_line_and_marks_are_crosses():
    with plots.style():
        figure = draw_scatter(Scatter(X, Y, POINTS, marks=[Point("a", "there", 3.0, 0.3)], joined=True, bound="z"))
    first, second = ({line.get_label(): line for line in seen(axes)} for axes in figure.axes)
    assert first["z"].get_linestyle() != "-"
    assert first["z"].get_marker() in ("None", None)
    assert (first["there"].get_marker(), first["there"].get_xdata()[0]) == ("x", 3.0)
    assert "there" not in second


def test_an_axis_that_is_not_shared_fits_its_panel():
    points = [Point("a", "s", 1e-3, 0.1), Point("b", "s", 1e3, 0.1)]
    with plots.style():
        figure = draw_scatter(Scatter(replace(X, shared=False), Y, points))
    for axes, x in zip(figure.axes, (1e-3, 1e3), strict=True):
        assert axes.get_xlim()[0] < x < axes.get_xlim()[1] < 10 * x


def test_every_series_up_to_eighteen_looks_different():
    with plots.style():
        figure = draw_scatter(Scatter(X, Y, [Point("p", str(index), 1.0, 1.0) for index in range(18)]))
    assert len({(line.get_color(), line.get_marker()) for line in seen(figure.axes[0])}) == 18


def test_every_point_has_its_name_and_values_in_a_tooltip():
    points = [Point("p", "series", 2.0, 0.25, "int4-g128"), Point("p", "<&> \x01", 3.0, 0.5)]
    root = ElementTree.fromstring(plots.scatter_svg(Scatter(X, Y, points)))
    tips = {tip.find("{*}title").text: tip for tip in root.findall(".//{*}circle")}
    assert set(tips) == {"int4-g128: 2.00 bits, 0.250", "<&> �: 3.00 bits, 0.500"}
    # The markers that are seen have white edges; those of the legend come last.
    marks = [mark for mark in root.findall(".//{*}use") if mark.get("stroke") == "#ffffff"][: len(points)]
    for tip, mark in zip(tips.values(), marks, strict=True):
        assert (tip.attrib["cx"], tip.attrib["cy"]) == (mark.attrib["x"], mark.attrib["y"])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_what_has_no_place_on_an_axis_is_not_drawn(value):
    assert plots.scatter("x.svg", Scatter(X, Y, [Point("p", "s", 1.0, value)])) == []
    (figure,) = plots.scatter("x.svg", Scatter(X, Y, [Point("p", "s", 1.0, value), Point("p", "t", 1.0, 2.0)]))
    assert ">t</text>" in figure.svg
    assert ">s</text>" not in figure.svg


@pytest.mark.parametrize("cell", [1e-7, 0.003, 0.02, 0.3, 4.0])
def test_numbers_of_a_heat_map_stand_out_from_their_cell(cell):
    cells = [plots.Cell("p", "row", str(value), value) for value in (1e-7, cell, 4.0)]
    root = ElementTree.fromstring(plots.heat_map_svg(cells))
    grounds = [path.attrib["fill"] for path in root.findall(".//{*}path") if path.get("stroke") == "#ffffff"]
    numbers = [text.attrib["fill"] for text in root.findall(".//{*}text") if text.get("font-size") == "8px"]
    assert len(grounds) == len(numbers) == len({value.column for value in cells})
    assert all(contrast(ground, number) >= 4.5 for ground, number in zip(grounds, numbers, strict=True))


def test_without_matplotlib_the_extra_is_named(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ReportError, match=r"epic-quant\[report\]"):
        draw(POINTS)


def test_a_heat_map_has_a_number_in_every_cell_and_none_where_nothing_was_measured():
    cells = [plots.Cell("p", "mlp", "int4", 0.0123), plots.Cell("p", "embedding", "int3", 4.0)]
    with plots.style():
        (axes,) = plots.draw_heat_map(cells).axes
    written = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert written == {(0.5, 0.5): "0.012", (1.5, 0.5): "—", (0.5, 1.5): "—", (1.5, 1.5): "4.0"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mlp", "embedding"]


def test_no_number_is_written_as_markup(draw):
    assert "mathdefault" not in draw(POINTS)


def test_a_plot_in_words_names_axes_panels_and_lines_and_goes_from_the_least_value_to_the_greatest():
    points = [Point("p", "middle", 1.0, 0.5), Point("p", "high", 2.0, 4.0), Point("q", "low", 3.0, 0.25)]
    plot = Scatter(X, replace(Y, log=False), points, lines=[FRONT], marks=[Point("p", "there", 1.0, 1.0)])
    assert plots.description(plot) == (
        "Error over bits (logarithmic), a panel for each of p, q, with front, there; from 0.250 of low in q to 4.00 of "
        "high in p"
    )
