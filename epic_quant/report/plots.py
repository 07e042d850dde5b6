"""Plots as SVG text: the same points always give the same bytes."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from epic_quant.errors import ReportError
from epic_quant.report import blocks
from epic_quant.report.formatting import significant
from epic_quant.report.palette import LIGHT, ON_DARK, ON_PALE, SERIES, contrast
from epic_quant.report.svg import TIP, trimmed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_T = TypeVar("_T")


@dataclass(frozen=True)
class Point:
    """A pair of coordinates, the panel that it is drawn in and the series that it belongs to.

    The name is shown in its tooltip: its own, or that of its series.
    """

    panel: str
    series: str
    x: float
    y: float
    name: str = ""


@dataclass(frozen=True)
class Line:
    """A curve to read points against, in all panels; its points are named where there is room."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """A label, how a value is written at a point, and the scale. Without limits it shows all points and lines.

    `ticks` are those of every decade of a logarithmic axis. A shared axis is the same in all panels.
    """

    label: str
    tip: Callable[[float], str]
    log: bool = True
    limits: tuple[float, float] | None = None
    ticks: tuple[float, ...] = (1.0, 2.0, 5.0)
    shared: bool = True

    def shows(self, value: float) -> bool:
        """Whether a value has a place on it."""
        return drawable(value) if self.log else math.isfinite(value)


@dataclass(frozen=True)
class Scatter:
    """Points in panels: a colour and a marker for each series, joined by lines where `joined`.

    `marks` are drawn as crosses. A series named `bound` is drawn as a dashed line without markers.
    """

    x: Axis
    y: Axis
    points: Sequence[Point]
    lines: Sequence[Line] = ()
    marks: Sequence[Point] = ()
    joined: bool = False
    bound: str = ""
    size: tuple[float, float] = (4.6, 3.0)  # of a panel, in inches


@dataclass(frozen=True)
class Cell:
    """A `drawable` value in a row and a column of a panel."""

    panel: str
    row: str
    column: str
    value: float


_COLOURS = tuple(LIGHT[name] for name in SERIES)
_MARKERS = "osD^vp<>h"
# Characters of a name in a legend, and of one beside its point.
_LONGEST_NAME = 60
_LONGEST_LABEL = 20
_LABEL_WIDTH = 0.2  # of the axes
_DASHED = (0, (4, 2))
_GREY, _INK = LIGHT["muted"], LIGHT["ink"]

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "epic_quant",
    "text.color": _INK,
    # Names come from outside and may hold a dollar sign.
    "text.parse_math": False,
    "xtick.color": _GREY,
    "xtick.labelcolor": _INK,
    "ytick.color": _GREY,
    "ytick.labelcolor": _INK,
}


def drawable(value: float | None) -> TypeGuard[float]:
    """Whether a value has a place on a logarithmic axis."""
    return value is not None and 0 < value < math.inf


def padded(values: Iterable[float]) -> tuple[float, float]:
    """The ends of a logarithmic axis that shows all values with some room."""
    values = list(values)
    return min(values) / 1.6, max(values) * 1.6


def extremes(items: Sequence[_T], value: Callable[[_T], float]) -> tuple[_T, _T]:
    """The items of the least and of the greatest value, the first of equals."""
    return min(items, key=value), max(items, key=value)


def scatter(file_name: str, plot: Scatter, about: str = "") -> list[blocks.Block]:
    """The figure, described in words; nothing where no point is drawable. `about` ends the description."""
    shown = [point for point in plot.points if plot.x.shows(point.x) and plot.y.shows(point.y)]
    plot = replace(plot, points=shown)
    if not plot.points:
        return []
    return [blocks.Figure(file_name, description(plot, about), scatter_svg(plot))]


def description(plot: Scatter, about: str = "") -> str:
    """What a plot shows in words: its axes, panels and lines, and from which least to which greatest value it goes."""
    axes = (f"{axis.label}{' (logarithmic)' if axis.log else ''}" for axis in (plot.y, plot.x))
    parts = [" over ".join(axes)]
    panels = [panel for panel in dict.fromkeys(point.panel for point in plot.points) if panel]
    if panels:
        parts.append(f"a panel for each of {', '.join(panels)}")
    drawn = [line.name for line in plot.lines] + ([plot.bound] if plot.bound else [])
    drawn += dict.fromkeys(mark.series for mark in plot.marks)
    if drawn:
        parts.append(f"with {', '.join(' '.join(name.split()) for name in drawn)}")
    points = [point for point in plot.points if point.series != plot.bound] or plot.points
    ends = (
        f"{plot.y.tip(point.y)} of {point.name or point.series}{f' in {point.panel}' if point.panel else ''}"
        for point in extremes(points, lambda point: point.y)
    )
    text = f"{', '.join(parts)}; from {' to '.join(ends)}" + (f"; {about}" if about else "")
    return text[0].upper() + text[1:]


def scatter_svg(plot: Scatter) -> str:
    """The SVG of a scatter plot whose points are drawable."""
    return svg_text(lambda: draw_scatter(plot))


def draw_scatter(plot: Scatter) -> Figure:
    """The figure of `scatter_svg`, to be called inside `style`."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(point.panel for point in plot.points))
    num_columns = min(2, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    width, height = plot.size
    figure = Figure(figsize=(width * num_columns + 2.4, height * num_rows + 0.6), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=plot.x.shared, sharey=plot.y.shared)
    looks = _looks([point for point in plot.points if point.series != plot.bound])
    if plot.bound:
        looks[plot.bound] = {"color": _INK, "linestyle": _DASHED}
    for axes, panel in zip(grid.flat, panels, strict=False):
        inside = [point for point in plot.points if point.panel == panel]
        axes.set_title(panel, loc="left")
        axes.set(xscale="log" if plot.x.log else "linear", yscale="log" if plot.y.log else "linear")
        axes.set_xlim(_limits(plot.x, inside, plot, 0))
        axes.set_ylim(_limits(plot.y, inside, plot, 1))
        axes.tick_params(labelbottom=True, labelleft=True)
        for line in plot.lines:
            _draw_line(axes, line)
        for series, look in looks.items():
            drawn = [(point.x, point.y) for point in inside if point.series == series]
            joined = {"linewidth": 1.0} if plot.joined else {"linestyle": "none"}
            drawn = sorted(drawn) if plot.joined else drawn
            axes.plot([x for x, _ in drawn], [y for _, y in drawn], **(joined | look), label=series)
        marks = [mark for mark in plot.marks if mark.panel == panel]
        for mark in marks:
            axes.plot([mark.x], [mark.y], "x", color=_INK, markersize=9, label=mark.series)
        for point in (*inside, *marks):
            text = f"{point.name or point.series}: {plot.x.tip(point.x)}, {plot.y.tip(point.y)}"
            axes.plot([point.x], [point.y], "o", alpha=0, markersize=1, gid=f"{TIP}{text}")
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    for which, axis in (("x", plot.x), ("y", plot.y)):
        if axis.log:
            _plain_ticks(figure.axes, which, axis.ticks)
    figure.supxlabel(plot.x.label, fontsize=10)
    figure.supylabel(plot.y.label, fontsize=10)
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in entries}
    figure.legend(list(entries.values()), [shortened(name) for name in entries], loc="outside right center")
    return figure


def _draw_line(axes: Axes, line: Line) -> None:
    """A line, and the names of its points as far as there is room: tooltips name all of them."""
    look = {"color": _GREY, "linestyle": _DASHED} if line.dashed else {"color": _INK}
    axes.plot([x for x, _ in line.points], [y for _, y in line.points], **look, linewidth=1.2, label=line.name)
    taken = -_LABEL_WIDTH
    for name, place in zip(line.names, line.points, strict=False):
        x = axes.transAxes.inverted().transform(axes.transData.transform(place))[0]
        if len(name) <= _LONGEST_LABEL and x - taken >= _LABEL_WIDTH:
            taken = x
            # Below and left of a front no point can be.
            axes.annotate(name, place, (-7, -2), textcoords="offset points", ha="right", va="top", fontsize=9)


def _limits(axis: Axis, inside: Sequence[Point], plot: Scatter, which: int) -> tuple[float, float]:
    if axis.limits is not None:
        return axis.limits
    points = plot.points if axis.shared else inside
    places = [(point.x, point.y) for point in points] + [place for line in plot.lines for place in line.points]
    return padded(place[which] for place in places)


def heat_map(file_name: str, what: str, rows: str, cells: Sequence[Cell]) -> list[blocks.Block]:
    """The figure of values of `what` by row, described in words; nothing where there is no cell."""
    if not cells:
        return []
    low, high = extremes(cells, lambda cell: cell.value)
    alt = (
        f"{what} as a heat map, a row for each {rows}, a panel for each of "
        f"{', '.join(dict.fromkeys(cell.panel for cell in cells))}; from {significant(low.value)} of {low.row} "
        f"{low.column} to {significant(high.value)} of {high.row} {high.column}"
    )
    return [blocks.Figure(file_name, alt, heat_map_svg(cells))]


def heat_map_svg(cells: Sequence[Cell]) -> str:
    """Values as colours on one logarithmic scale and as numbers, a panel of rows and columns below the other."""
    return svg_text(lambda: draw_heat_map(cells))


def draw_heat_map(cells: Sequence[Cell]) -> Figure:
    """The figure of `heat_map_svg`, to be called inside `style`."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, to_hex
    from matplotlib.figure import Figure

    panels: dict[str, list[Cell]] = {}
    for cell in cells:
        panels.setdefault(cell.panel, []).append(cell)
    rows = {panel: list(dict.fromkeys(cell.row for cell in inside)) for panel, inside in panels.items()}
    columns = {panel: list(dict.fromkeys(cell.column for cell in inside)) for panel, inside in panels.items()}
    widest, heights = max(map(len, columns.values())), [len(names) for names in rows.values()]
    size = (2.4 + 0.75 * widest, 0.9 * len(panels) + 0.4 * sum(heights) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights}).flat
    low, high = padded(cell.value for cell in cells)
    norm, colour_map = LogNorm(low, high), colormaps["YlOrBr"]
    for axes, (panel, inside) in zip(grid, panels.items(), strict=True):
        values = {(cell.row, cell.column): cell.value for cell in inside}
        mesh = [[values.get((row, column), math.nan) for column in columns[panel]] for row in rows[panel]]
        # A mesh is made of paths; an image would be a picture inside the SVG.
        axes.pcolormesh(mesh, norm=norm, cmap=colour_map, edgecolors="white", linewidth=1.0)
        for y, line in enumerate(mesh):
            for x, value in enumerate(line):
                colour = _GREY
                if drawable(value):
                    colour = max(ON_PALE, ON_DARK, key=partial(contrast, to_hex(colour_map(norm(value)))))
                axes.text(x + 0.5, y + 0.5, significant(value, 2), ha="center", va="center", color=colour, fontsize=8)
        axes.set_title(panel, loc="left")
        names = [shortened(name) for name in columns[panel]]
        axes.set_xticks([x + 0.5 for x in range(len(names))], names, rotation=30, ha="right")
        axes.set_yticks([y + 0.5 for y in range(len(rows[panel]))], [shortened(name) for name in rows[panel]])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.invert_yaxis()
    return figure


def shortened(name: str) -> str:
    """A name for a legend or an axis: a long one would leave the axes no room."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


@contextmanager
def style() -> Iterator[None]:
    """The defaults of matplotlib and our style, whatever the user's own settings are; raises ReportError without it."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise ReportError("plots need matplotlib: pip install 'epic-quant[report]'") from error
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # Text stays text, so that a glyph which matplotlib's font lacks is the reader's to draw.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def svg_text(draw: Callable[[], Figure]) -> str:
    """What a function draws, in our style, as SVG; raises ReportError without matplotlib."""
    with style():
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        buffer = io.StringIO()
        # Neither the day nor matplotlib's version belongs in a file that is compared.
        FigureCanvasSVG(draw()).print_figure(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return trimmed(buffer.getvalue())


def _looks(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each series; no two of the first 18 share both."""
    names = dict.fromkeys(point.series for point in points)
    return {
        name: {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "markersize": 7,
            "markeredgecolor": "white",
            "markeredgewidth": 0.5,
        }
        for index, name in enumerate(names)
    }


def _plain_ticks(all_axes: Sequence[Axes], which: str, subs: tuple[float, ...]) -> None:
    """Ticks at `subs` of every decade of a logarithmic axis, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axes in all_axes:
        axis = axes.xaxis if which == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
