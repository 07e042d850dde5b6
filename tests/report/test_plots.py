import re
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from epic_quant.errors import ReportError
from epic_quant.report import plots
from epic_quant.report.palette import contrast
from epic_quant.report.plots import Point

POINTS = [Point(panel, series, 2.0 + index, 0.4 / (1 + index)) for panel in "ab" for index, series in enumerate("xyz")]
FRONT = [Point("", "x", 1.0, 0.5), Point("", "y", 2.0, 0.1)]
DRAWINGS = {
    "quality over bytes": lambda points: plots.quality_over_bytes(points, FRONT, 0.01),
    "divergence over errors": lambda points: plots.divergence_over_errors(points),
    "heat map": lambda points: plots.heat_map([plots.Cell(p.panel, p.series, "column", p.y) for p in points]),
    "error over bits": lambda points: plots.error_over_bits(points),
    "time over bytes": lambda points: plots.time_over_bytes(points, 12.5),
    "time over bytes, bandwidth unknown": lambda points: plots.time_over_bytes(points, None),
    "divergence over bytes": lambda points: plots.divergence_over_bytes(points),
    "hits over bytes": lambda points: plots.hits_over_bytes(points, points[:1], "z"),
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


def test_points_lie_where_their_values_are():
    with plots.style():
        figure = plots.draw_error_over_bits(POINTS)
    for axes, panel in zip(figure.axes, "ab", strict=True):
        assert axes.get_title("left") == panel
        drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in seen(axes)}
        for point in POINTS:
            assert drawn[point.series] == ([point.x], [point.y])


def test_divergences_lie_where_their_values_are_on_logarithmic_axes():
    with plots.style():
        figure = plots.draw_divergence_over_bytes(POINTS)
    for axes, panel in zip(figure.axes, "ab", strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        drawn = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in seen(axes)}
        assert drawn == {point.series: (point.x, point.y) for point in POINTS if point.panel == panel}
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert all(left < x < right and bottom < y < top for x, y in drawn.values())


def test_the_bandwidth_line_is_bytes_over_bandwidth():
    with plots.style():
        figure = plots.draw_time_over_bytes(POINTS, 12.5)
    line = next(line for line in figure.axes[0].lines if "reading" in line.get_label())
    for megabytes, milliseconds in zip(line.get_xdata(), line.get_ydata(), strict=True):
        assert milliseconds / 1e3 == pytest.approx(megabytes * 1e6 / 12.5e9)


def test_every_series_up_to_eighteen_looks_different():
    with plots.style():
        figure = plots.draw_time_over_bytes([Point("p", str(index), 1.0, 1.0) for index in range(18)], None)
    assert len({(line.get_color(), line.get_marker()) for line in seen(figure.axes[0])}) == 18


def test_every_point_tells_its_name_and_values_where_it_is():
    points = [Point("p", "series", 2.0, 0.25, "int4-g128"), Point("p", "<&> \x01", 3.0, 0.5)]
    root = ElementTree.fromstring(plots.error_over_bits(points))
    tips = {tip.find("{*}title").text: tip for tip in root.findall(".//{*}circle")}
    assert set(tips) == {
        "int4-g128: 2.000 bits a weight, relative L2 0.250",
        "<&> �: 3.000 bits a weight, relative L2 0.500",
    }
    # The markers that are seen have white edges; those of the legend come last.
    marks = [mark for mark in root.findall(".//{*}use") if mark.get("stroke") == "#ffffff"][: len(points)]
    for tip, mark in zip(tips.values(), marks, strict=True):
        assert (tip.attrib["cx"], tip.attrib["cy"]) == (mark.attrib["x"], mark.attrib["y"])


@pytest.mark.parametrize("cell", [1e-7, 0.003, 0.02, 0.3, 4.0])
def test_numbers_of_a_heat_map_stand_out_from_their_cell(cell):
    cells = [plots.Cell("p", "row", str(value), value) for value in (1e-7, cell, 4.0)]
    root = ElementTree.fromstring(plots.heat_map(cells))
    grounds = [path.attrib["fill"] for path in root.findall(".//{*}path") if path.get("stroke") == "#ffffff"]
    numbers = [text.attrib["fill"] for text in root.findall(".//{*}text") if text.get("font-size") == "8px"]
    assert len(grounds) == len(numbers) == len({value.column for value in cells})
    assert all(contrast(ground, number) >= 4.5 for ground, number in zip(grounds, numbers, strict=True))


def test_without_matplotlib_the_extra_is_named(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ReportError, match=r"epic-quant\[report\]"):
        draw(POINTS)


def test_the_front_and_the_noise_are_drawn_where_they_are():
    with plots.style():
        figure = plots.draw_quality_over_bytes(POINTS, FRONT, 0.01)
    lines = {line.get_label(): line for line in seen(figure.axes[0])}
    assert list(lines["Pareto front"].get_xdata()) == [1.0, 2.0]
    assert set(lines["bf16 compute"].get_ydata()) == {0.01}


def test_a_heat_map_has_a_number_in_every_cell_and_none_where_nothing_was_measured():
    cells = [plots.Cell("p", "mlp", "int4", 0.0123), plots.Cell("p", "embedding", "int3", 4.0)]
    with plots.style():
        (axes,) = plots.draw_heat_map(cells).axes
    written = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert written == {(0.5, 0.5): "0.012", (1.5, 0.5): "—", (0.5, 1.5): "—", (1.5, 1.5): "4.0"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mlp", "embedding"]


def test_every_error_has_its_own_axis():
    with plots.style():
        figure = plots.draw_divergence_over_errors([Point("a", "s", 1e-3, 0.1), Point("b", "s", 1e3, 0.1)])
    assert [axes.get_xlim()[0] < x < axes.get_xlim()[1] for axes, x in zip(figure.axes, (1e-3, 1e3), strict=True)] == [
        True,
        True,
    ]


def test_no_number_is_written_as_markup(draw):
    assert "mathdefault" not in draw(POINTS)


def test_a_plot_in_words_goes_from_the_least_value_to_the_greatest():
    points = [Point("p", "middle", 1.0, 0.5), Point("p", "high", 2.0, 4.0), Point("q", "low", 3.0, 0.25)]
    said = plots.extremes(points, lambda point: f"{point.series} in {point.panel}", "ms")
    assert said == "from 0.250 ms of low in q to 4.00 ms of high in p"
    assert plots.extremes([], str) == ""
