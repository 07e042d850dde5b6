import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from epic_quant.errors import ReportError
from epic_quant.report import plots
from epic_quant.report.plots import Point

POINTS = [Point(panel, series, 2.0 + index, 0.4 / (1 + index)) for panel in "ab" for index, series in enumerate("xyz")]
DRAWINGS = {
    "quality over bytes": lambda points: plots.quality_over_bytes(points, [(1.0, 0.5), (2.0, 0.1)], 0.01),
    "divergence over errors": lambda points: plots.divergence_over_errors(points),
    "heat map": lambda points: plots.heat_map([plots.Cell(p.panel, p.series, "column", p.y) for p in points]),
    "error over bits": lambda points: plots.error_over_bits(points),
    "time over bytes": lambda points: plots.time_over_bytes(points, 12.5),
    "time over bytes, bandwidth unknown": lambda points: plots.time_over_bytes(points, None),
    "divergence over bytes": lambda points: plots.divergence_over_bytes(points),
    "hits over bytes": lambda points: plots.hits_over_bytes(points, points[:1], "z"),
}


@pytest.fixture(params=DRAWINGS.values(), ids=DRAWINGS)
def draw(request):
    return request.param


def test_a_plot_is_an_svg_with_a_white_ground(draw):
    root = ElementTree.fromstring(draw(POINTS))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "fill: #ffffff" in ElementTree.tostring(root.find(".//*[@id='patch_1']"), encoding="unicode")


def test_a_plot_is_the_same_each_time_whatever_the_users_settings(draw):
    first = draw(POINTS)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "none"}):
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
        drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for point in POINTS:
            assert drawn[point.series] == ([point.x], [point.y])


def test_divergences_lie_where_their_values_are_on_logarithmic_axes():
    with plots.style():
        figure = plots.draw_divergence_over_bytes(POINTS)
    for axes, panel in zip(figure.axes, "ab", strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        drawn = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines}
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
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}) == 18


def test_without_matplotlib_the_extra_is_named(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ReportError, match=r"epic-quant\[report\]"):
        draw(POINTS)


def test_the_front_and_the_noise_are_drawn_where_they_are():
    with plots.style():
        figure = plots.draw_quality_over_bytes(POINTS, [(1.0, 0.5), (2.0, 0.1)], 0.01)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
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
