"""The heat map of layers: a small square for each layer and kind of tensor, and a column of the global tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from epic_quant.report import blocks
from epic_quant.report.palette import LIGHT
from epic_quant.report.plots import drawable, extremes, padded, shortened, svg_text
from epic_quant.report.svg import TIP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, LogNorm
    from matplotlib.figure import Figure

_SQUARE, _LEAST_WIDTH = 0.25, 5.5  # of a cell and of all layers, in inches
_COLOURS = 32  # of the legend; cells have all that there are


@dataclass(frozen=True)
class Square:
    """A value of a row's kind in a layer; a global tensor has a row of its own, and None for a layer."""

    row: str
    layer: int | None
    value: float
    tip: str


@dataclass(frozen=True)
class LayerMap:
    """Values on one logarithmic scale of colours; rows stand as they first come, layers `marked` have a triangle."""

    title: str
    legend: str
    squares: Sequence[Square]
    marked: Collection[int]
    mark: str  # what a triangle means


def layer_map(file_name: str, what: str, plot: LayerMap) -> list[blocks.Block]:
    """The figure of values of `what`, described in words; nothing where no value is drawable."""
    shown = [square for square in plot.squares if drawable(square.value)]
    if not shown:
        return []
    low, high = extremes(shown, lambda square: square.value)
    alt = (
        f"{what} as a heat map (logarithmic colours), a column for each layer, a row for each kind of tensor, and a "
        f"column of the tensors that belong to no layer; from {low.tip} to {high.tip}; blank where there is no such "
        "tensor"
    )
    return [blocks.Figure(file_name, alt, layer_map_svg(replace(plot, squares=shown)))]


def layer_map_svg(plot: LayerMap) -> str:
    """The SVG of squares whose values are drawable."""
    return svg_text(lambda: draw_layer_map(plot))


def draw_layer_map(plot: LayerMap) -> Figure:
    """The figure of `layer_map_svg`, to be called inside `plots.style`."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    inside = [square for square in plot.squares if square.layer is not None]
    outside = [square for square in plot.squares if square.layer is None]
    layers = sorted({square.layer for square in inside if square.layer is not None})
    rows = list(dict.fromkeys(square.row for square in inside))
    height = max(len(rows), len(outside), 1)
    width = max(_LEAST_WIDTH, _SQUARE * len(layers)) if layers else _SQUARE
    side = width / max(1, len(layers))
    figure = Figure(figsize=(width + 1.8 + (2.4 if outside else 0.0), 0.32 * height + 2.1), layout="constrained")
    panels = ([width] if inside else []) + ([side] if outside else [])
    grid = list(figure.subplots(1, len(panels), squeeze=False, gridspec_kw={"width_ratios": panels}).flat)
    norm = LogNorm(*padded(square.value for square in plot.squares))
    colours = colormaps["YlOrRd"]
    if inside:
        axes = grid[0]
        places = [(layers.index(square.layer or 0), rows.index(square.row), square) for square in inside]
        _draw(axes, places, len(layers), height, norm, colours)
        axes.set_yticks([y + 0.5 for y in range(len(rows))], [shortened(name) for name in rows])
        axes.set_xticks([x + 0.5 for x in range(len(layers))], [str(layer) for layer in layers], fontsize=8)
        marked = [x for x, layer in enumerate(layers) if layer in plot.marked]
        axes.plot([x + 0.5 for x in marked], [-0.3] * len(marked), "v", color=LIGHT["ink"], markersize=5, clip_on=False)
        for x in marked:
            axes.get_xticklabels()[x].set_fontweight("bold")
        axes.set_xlabel(f"layer{f' (▼ {plot.mark})' if marked else ''}")
        axes.set_title("tensors of each layer", loc="left", pad=16, fontweight="normal")
    if outside:
        axes = grid[-1]
        _draw(axes, [(0, y, square) for y, square in enumerate(outside)], 1, height, norm, colours)
        axes.yaxis.tick_right()
        axes.set_yticks([y + 0.5 for y in range(len(outside))], [shortened(square.row) for square in outside])
        axes.set_xticks([])
        axes.set_title("all others", loc="left", pad=16, fontweight="normal")
    legend = ScalarMappable(norm, colours.resampled(_COLOURS))
    figure.colorbar(
        legend,
        ax=grid,
        location="bottom",
        label=plot.legend,
        aspect=40,
        shrink=0.6,
        format=lambda value, _: f"{value:g}",
    )
    figure.suptitle(plot.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _draw(
    axes: Axes, places: Sequence[tuple[int, int, Square]], width: int, height: int, norm: LogNorm, colours: Colormap
) -> None:
    """Squares at their column and row, each with its tooltip."""
    mesh = [[math.nan] * width for _ in range(height)]
    for x, y, square in places:
        mesh[y][x] = square.value
    # A mesh is made of paths; an image would be a picture inside the SVG.
    axes.pcolormesh(mesh, norm=norm, cmap=colours, edgecolors="white", linewidth=0.8)
    for x, y, square in places:
        axes.plot([x + 0.5], [y + 0.5], "o", alpha=0, markersize=1, gid=f"{TIP}{square.tip}")
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
