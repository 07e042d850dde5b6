"""Plots as SVG text: the same points always give the same bytes. The only module that needs matplotlib."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

from epic_quant.errors import ReportError
from epic_quant.report.formatting import megabytes, significant
from epic_quant.report.gaussian import LLOYD_MAX, shannon
from epic_quant.report.palette import LIGHT, ON_DARK, ON_PALE, SERIES, contrast
from epic_quant.report.svg import TIP, trimmed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """A pair of `drawable` coordinates, the panel that it is drawn in and the series that it belongs to.

    The name is what it is told by where it is pointed at: its own, or that of its series.
    """

    panel: str
    series: str
    x: float
    y: float
    name: str = ""


@dataclass(frozen=True)
class Cell:
    """A `drawable` value in a row and a column of a panel."""

    panel: str
    row: str
    column: str
    value: float


_COLOURS = tuple(LIGHT[name] for name in SERIES)
_MARKERS = "osD^vp<>h"
_LONGEST_LABEL = 20
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


def extremes(points: Sequence[Point], name: Callable[[Point], str], unit: str = "") -> str:
    """What a plot shows in words: from which least to which greatest value; nothing where it has no point."""
    if not points:
        return ""
    low, high = (choose(points, key=lambda point: point.y) for choose in (min, max))
    ends = (f"{significant(point.y)}{f' {unit}' if unit else ''} of {name(point)}" for point in (low, high))
    return f"from {' to '.join(ends)}"


def error_over_bits(points: Sequence[Point]) -> str:
    """Relative L2 over bits per weight, a panel for each tensor class, with the bounds of a Gaussian source."""
    return _svg(lambda: draw_error_over_bits(points))


def time_over_bytes(points: Sequence[Point], bandwidth_gbs: float | None) -> str:
    """Milliseconds over MB of weights, a panel for each layer type, with the time that reading the bytes takes."""
    return _svg(lambda: draw_time_over_bytes(points, bandwidth_gbs))


def hits_over_bytes(points: Sequence[Point], marks: Sequence[Point], bound: str) -> str:
    """Hit rate over resident MB, a panel for each trace; the series `bound` is drawn as a limit, `marks` as crosses."""
    return _svg(lambda: draw_hits_over_bytes(points, marks, bound))


def divergence_over_bytes(points: Sequence[Point]) -> str:
    """KL divergence in nats over bytes a token of the KV cache, a panel for each context length."""
    return _svg(lambda: draw_divergence_over_bytes(points))


def quality_over_bytes(points: Sequence[Point], front: Sequence[Point], floor: float | None) -> str:
    """KL divergence over resident MB, with the Pareto front, each point of it named, and the noise floor as lines."""
    return _svg(lambda: draw_quality_over_bytes(points, front, floor))


def divergence_over_errors(points: Sequence[Point]) -> str:
    """KL divergence over a cheaper error, a panel for each kind of error."""
    return _svg(lambda: draw_divergence_over_errors(points))


def heat_map(cells: Sequence[Cell]) -> str:
    """Values as colours on one logarithmic scale and as numbers, a panel of rows and columns below the other."""
    return _svg(lambda: draw_heat_map(cells))


def draw_error_over_bits(points: Sequence[Point]) -> Figure:
    """The figure of `error_over_bits`, to be called inside `style`."""
    panels = list(dict.fromkeys(point.panel for point in points))
    num_columns = min(2, len(panels))
    figure = _new_figure(math.ceil(len(panels) / num_columns), num_columns, len(panels), 5.0, 3.2)
    looks = _looks(points)
    bits = [0.9, max([4.2, *(point.x + 0.2 for point in points)])]
    for axes, panel in zip(figure.axes, panels, strict=True):
        axes.set_title(panel, loc="left")
        axes.set_yscale("log")
        axes.plot(bits, [shannon(rate) for rate in bits], color=_INK, linewidth=1.2, label="Shannon's bound")
        axes.plot(
            list(LLOYD_MAX),
            list(LLOYD_MAX.values()),
            color=_GREY,
            linestyle=(0, (4, 2)),
            linewidth=1.2,
            marker=".",
            label="Lloyd-Max, Gaussian",
        )
        for series, look in looks.items():
            inside = sorted((point.x, point.y) for point in points if (point.panel, point.series) == (panel, series))
            axes.plot([x for x, _ in inside], [y for _, y in inside], **look, linewidth=1.0, label=series)
        axes.set_xlim(bits[0], bits[1])
        _tell(axes, panel, points, lambda x, y: f"{significant(x, 4)} bits a weight, relative L2 {significant(y)}")
    _plain_ticks(figure.axes, "y")
    figure.supxlabel("bits per weight, scales and other metadata included", fontsize=10)
    figure.supylabel("relative L2 error", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2 * num_columns + 1)
    return figure


def draw_time_over_bytes(points: Sequence[Point], bandwidth_gbs: float | None) -> Figure:
    """The figure of `time_over_bytes`, to be called inside `style`."""
    panels = list(dict.fromkeys(point.panel for point in points))
    figure = _new_figure(1, len(panels), len(panels), 4.6, 4.2)
    looks = _looks(points)
    left, right = _padded([point.x for point in points])
    # MB over GB/s is ms.
    floor = [] if not bandwidth_gbs else [right / bandwidth_gbs, min(point.x for point in points) / bandwidth_gbs]
    heights = _padded([*(point.y for point in points), *floor])
    for axes, panel in zip(figure.axes, panels, strict=True):
        axes.set_title(panel, loc="left")
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=heights)
        if bandwidth_gbs:
            label = f"reading the weights\nonce, at {significant(bandwidth_gbs)} GB/s"
            edges = [left, right]
            axes.plot(edges, [edge / bandwidth_gbs for edge in edges], color=_INK, linewidth=1.2, label=label)
        for series, look in looks.items():
            inside = [(point.x, point.y) for point in points if (point.panel, point.series) == (panel, series)]
            axes.plot([x for x, _ in inside], [y for _, y in inside], **look, linestyle="none", label=series)
        _tell(axes, panel, points, lambda x, y: f"{significant(x)} MB, {significant(y)} ms")
    _plain_ticks(figure.axes, "x")
    _plain_ticks(figure.axes, "y")
    figure.supxlabel("MB of the block's weights", fontsize=10)
    figure.supylabel("ms for one token", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def draw_hits_over_bytes(points: Sequence[Point], marks: Sequence[Point], bound: str) -> Figure:
    """The figure of `hits_over_bytes`, to be called inside `style`."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(point.panel for point in points))
    num_columns = min(2, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(4.6 * num_columns + 0.6, 2.7 * num_rows + 0.9), layout="constrained")
    # Tables differ in the bytes of a row, so every panel has MB of its own.
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flat
    looks = _looks([point for point in points if point.series != bound])
    looks[bound] = {"color": _INK, "linestyle": (0, (4, 2))}
    for axes, panel in zip(grid, panels, strict=False):
        axes.set_title(panel, loc="left")
        axes.set(xscale="log", ylim=(0, 1.02))
        for series, look in looks.items():
            inside = sorted((point.x, point.y) for point in points if (point.panel, point.series) == (panel, series))
            axes.plot([x for x, _ in inside], [y for _, y in inside], **look, linewidth=1.0, label=series)
        for mark in marks:
            if mark.panel == panel:
                axes.plot([mark.x], [mark.y], "x", color=_INK, markersize=9, label=mark.series)
        told = [*points, *marks]
        _tell(axes, panel, told, lambda x, y: f"{significant(x)} MB, {significant(100 * y)}% hits")
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    _plain_ticks(figure.axes, "x")
    figure.supxlabel("MB of hot rows", fontsize=10)
    figure.supylabel("hit rate", fontsize=10)
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=4)
    return figure


def draw_divergence_over_bytes(points: Sequence[Point]) -> Figure:
    """The figure of `divergence_over_bytes`, to be called inside `style`."""
    panels = list(dict.fromkeys(point.panel for point in points))
    num_columns = min(2, len(panels))
    figure = _new_figure(math.ceil(len(panels) / num_columns), num_columns, len(panels), 4.6, 3.0)
    looks = _looks(points)
    for axes, panel in zip(figure.axes, panels, strict=True):
        axes.set_title(panel, loc="left")
        axes.set(xscale="log", yscale="log")
        for series, look in looks.items():
            inside = [(point.x, point.y) for point in points if (point.panel, point.series) == (panel, series)]
            axes.plot([x for x, _ in inside], [y for _, y in inside], **look, linestyle="none", label=series)
        _tell(axes, panel, points, lambda x, y: f"{significant(x, 4)} bytes a token, {significant(y)} nats")
    # The panels share their axes.
    figure.axes[0].set(xlim=_padded([point.x for point in points]), ylim=_padded([point.y for point in points]))
    _plain_ticks(figure.axes, "x")
    _plain_ticks(figure.axes, "y", subs=(1.0,))
    figure.supxlabel("bytes a token of the KV cache", fontsize=10)
    figure.supylabel("KL divergence, nats a token", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def draw_quality_over_bytes(points: Sequence[Point], front: Sequence[Point], floor: float | None) -> Figure:
    """The figure of `quality_over_bytes`, to be called inside `style`."""
    figure = _new_figure(1, 1, 1, 7.4, 4.4)
    (axes,) = figure.axes
    # Names of the front stand at its lower left, where no point can be; they need room there.
    left, right = min(point.x for point in points), max(point.x for point in points)
    axes.set_xlim(left - 0.3 * (right - left) - 0.05 * left, right + 0.08 * (right - left) + 0.01 * right)
    axes.set_yscale("log")
    axes.set_ylim(_padded([*(point.y for point in points), *([] if floor is None else [floor])]))
    axes.plot([point.x for point in front], [point.y for point in front], color=_INK, lw=1.0, label="Pareto front")
    # What has no short name is named where it is pointed at.
    for point in (point for point in front if len(point.series) <= _LONGEST_LABEL):
        axes.annotate(
            point.series, (point.x, point.y), (-7, -2), textcoords="offset points", ha="right", va="top", fontsize=9
        )
    if floor is not None:
        axes.axhline(floor, color=_GREY, linestyle=(0, (4, 2)), linewidth=1.2, label="bf16 compute")
    for series, look in _looks(points).items():
        inside = [(point.x, point.y) for point in points if point.series == series]
        axes.plot([x for x, _ in inside], [y for _, y in inside], **look, linestyle="none", label=series)
    for point in points:
        _tell(axes, point.panel, [point], lambda x, y: f"{megabytes(1e6 * x)} MB, {significant(y)} nats a token")
    _plain_ticks(figure.axes, "y", subs=(1.0,))
    figure.supxlabel("resident MB", fontsize=10)
    figure.supylabel("KL divergence, nats a token", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def draw_divergence_over_errors(points: Sequence[Point]) -> Figure:
    """The figure of `divergence_over_errors`, to be called inside `style`."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(point.panel for point in points))
    num_columns = min(2, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(4.6 * num_columns + 0.6, 3.2 * num_rows + 0.9), layout="constrained")
    # Each error has a range of its own.
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flat
    looks = _looks(points)
    for axes, panel in zip(grid, panels, strict=False):
        axes.set_title(panel, loc="left")
        axes.set(xscale="log", yscale="log")
        for series, look in looks.items():
            inside = [(point.x, point.y) for point in points if (point.panel, point.series) == (panel, series)]
            axes.plot([x for x, _ in inside], [y for _, y in inside], **look, linestyle="none", label=series)
        axes.set_xlim(_padded([point.x for point in points if point.panel == panel]))
        _tell(axes, panel, points, lambda x, y: f"error {significant(x)}, {significant(y)} nats a token")
    figure.axes[0].set_ylim(_padded([point.y for point in points]))
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    _plain_ticks(figure.axes, "x")
    _plain_ticks(figure.axes, "y", subs=(1.0,))
    figure.supxlabel("the cheaper error", fontsize=10)
    figure.supylabel("KL divergence, nats a token", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def draw_heat_map(cells: Sequence[Cell]) -> Figure:
    """The figure of `heat_map`, to be called inside `style`."""
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
    low, high = _padded([cell.value for cell in cells])
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
        axes.set_xticks([x + 0.5 for x in range(len(columns[panel]))], columns[panel], rotation=30, ha="right")
        axes.set_yticks([y + 0.5 for y in range(len(rows[panel]))], rows[panel])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.invert_yaxis()
    return figure


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


def _svg(draw: Callable[[], Figure]) -> str:
    with style():
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        buffer = io.StringIO()
        # Neither the day nor matplotlib's version belongs in a file that is compared.
        FigureCanvasSVG(draw()).print_figure(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return trimmed(buffer.getvalue())


def _new_figure(num_rows: int, num_columns: int, num_panels: int, panel_width: float, panel_height: float) -> Figure:
    from matplotlib.figure import Figure

    size = (max(5.0, panel_width * num_columns) + 0.6, panel_height * num_rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    first = None
    for index in range(num_panels):
        first = figure.add_subplot(num_rows, num_columns, index + 1, sharex=first, sharey=first)
    return figure


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


def _tell(axes: Axes, panel: str, points: Sequence[Point], values: Callable[[float, float], str]) -> None:
    """Give every point of the panel a text, its name and its values, that is shown where it is pointed at."""
    for point in points:
        if point.panel == panel:
            text = f"{point.name or point.series}: {values(point.x, point.y)}"
            axes.plot([point.x], [point.y], "o", alpha=0, markersize=1, gid=f"{TIP}{text}")


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a logarithmic axis that shows all values with some room."""
    return min(values) / 1.6, max(values) * 1.6


def _plain_ticks(all_axes: Sequence[Axes], which: str, subs: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Ticks at `subs` of every decade of a logarithmic axis, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axes in all_axes:
        axis = axes.xaxis if which == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
