"""The figures of a diagnosis; matplotlib's global state is not touched."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

DPI = 150
MOST_PANELS = 6
"""Student layers that are drawn; of more, so many spread evenly over the depth. The tables hold all."""
MOST_LABELLED = 13
"""Layers on an axis whose cells are written out."""
COLOURS = {"teacher": "#555555", "start": "#E69F00", "trained": "#0072B2"}
"""Of the palette of Okabe and Ito (2008), which all kinds of colour vision tell apart."""
STYLES = {"teacher": ":", "start": "--", "trained": "-"}
GRID_COLOUR = "#dddddd"
NARROWEST_SCALE = 5.0
"""Degrees that the colours of angles span at least, so that noise does not fill the scale."""

Angles = Mapping[int, tuple[Tensor, Tensor]]
"""Student layer -> mean angles and their null, `(layers, layers)` each."""


def angle_maps(rows: Mapping[str, Angles], title: str) -> Figure:
    """Draw a heat map per row and student layer: the colour is angle minus null, white at the null; text is the angle.

    All maps share one scale, symmetric about the null. The diagonal and undefined angles are grey.
    """
    chosen = {name: spread(list(maps)) for name, maps in rows.items()}
    columns = max(len(layers) for layers in chosen.values())
    size = len(next(iter(next(iter(rows.values())).values()))[0])
    written = size <= MOST_LABELLED
    panel = max(2.3, 0.36 * size + 0.5) if written else 2.8
    figure = _figure(1.6 + panel * columns, 0.9 + panel * len(rows), title)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    limit = max([NARROWEST_SCALE, *(_largest(angle - null) for maps in rows.values() for angle, null in maps.values())])
    for line, (name, maps) in zip(axes, rows.items(), strict=True):
        for axis, layer in zip(line, chosen[name], strict=False):
            angle, null = maps[layer]
            values = (angle - null).fill_diagonal_(math.nan).numpy()
            _heat(axis, values, "PuOr_r", -limit, limit)
            _write(axis, angle.numpy(), values, limit, "{:.0f}")
            axis.set_title(f"{name}, student layer {layer}", fontsize=9)
            axis.set_xlabel("teacher layer k", fontsize=8)
            axis.set_ylabel("teacher layer i", fontsize=8)
        for axis in line[len(chosen[name]) :]:
            axis.set_axis_off()
    _bar(
        figure,
        axes,
        "PuOr_r",
        (-limit, limit),
        f"angle minus its null (degrees){'; numbers: angle' if written else ''}",
    )
    return figure


def angle_histograms(
    histograms: Mapping[str, Mapping[int, Tensor]],
    nulls: Mapping[str, Mapping[int, float]],
    released: Mapping[str, Tensor],
    title: str,
) -> Figure:
    """Draw the distribution of angles over tokens and pairs per student layer, and the released code's of cosines.

    Dashed vertical lines are the mean nulls, the grey one is 90 degrees (cosine 0).
    """
    layers = spread(sorted({layer for maps in histograms.values() for layer in maps}))
    count = len(layers) + bool(released)
    columns = min(count, 4)
    figure = _figure(3.1 * columns, 0.7 + 2.5 * math.ceil(count / columns), title)
    axes = list(figure.subplots(math.ceil(count / columns), columns, squeeze=False).flat)
    for axis, layer in zip(axes, layers, strict=False):
        for name in (name for name, maps in histograms.items() if layer in maps):
            _density(axis, histograms[name][layer], 0, 180, 180, name)
            axis.axvline(nulls[name][layer], color=COLOURS[name], linestyle=(0, (3, 2)), linewidth=1)
        axis.axvline(90, color="#999999", linewidth=1)
        axis.set_title(f"student layer {layer}, all pairs", fontsize=9)
        _frame(axis, "angle (degrees); dashed: null, grey: 90", "share of angles per degree")
        axis.set_xlim(0, 180)
    if released:
        axis = axes[len(layers)]
        for name, counts in released.items():
            _density(axis, counts, -1, 1, 100, name)
        axis.axvline(0, color="#999999", linewidth=1)
        axis.set_title("as released: (T_1, S_1, T_last)", fontsize=9)
        _frame(axis, "cosine, padding counted; grey: 0", "share of positions per 0.02")
        axis.set_xlim(-1, 1)
    for axis in axes[count:]:
        axis.set_axis_off()
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def similarity_maps(matrices: Mapping[str, Tensor], title: str, debiased: bool) -> Figure:
    """Draw CKA of student layers (rows, layer 0 at the bottom) with teacher layers (columns), from 0 to 1."""
    rows, columns = (max(sizes) for sizes in zip(*(matrix.shape for matrix in matrices.values()), strict=True))
    cell = 0.45 if max(rows, columns) <= MOST_LABELLED else 0.22
    size = max(3.0, cell * columns + 0.8), max(2.4, cell * rows)
    figure = _figure(1.2 + size[0] * len(matrices), 1.3 + size[1], title)
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        values = matrix.numpy()
        _heat(axis, values, "viridis", 0.0, 1.0)
        axis.invert_yaxis()
        _write(axis, values, values, None, "{:.2f}")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("teacher layer", fontsize=8)
        axis.set_ylabel("student layer", fontsize=8)
    _bar(figure, axes, "viridis", (0.0, 1.0), f"linear CKA{', debiased (below 0 drawn as 0)' if debiased else ''}")
    return figure


def profiles(
    panels: Mapping[str, Mapping[str, Sequence[float | None]]],
    title: str,
    step: str,
    zero_line: Collection[str] = (),
    to_one: Collection[str] = (),
) -> Figure:
    """Draw one panel per measure with a line per model over its layers or blocks, numbered from 0 (`step` names them).

    Panels in `zero_line` get a grey line at 0; those in `to_one` reach to 1, so that little looks little.
    """
    columns = min(len(panels), 4)
    lines = math.ceil(len(panels) / columns)
    figure = _figure(3.0 * columns, 0.7 + 2.4 * lines, title)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, (measure, models) in zip(axes, panels.items(), strict=False):
        for name, values in models.items():
            heights = [math.nan if value is None else value for value in values]
            axis.plot(
                range(len(heights)), heights, STYLES[name], marker="o", markersize=3.5, color=COLOURS[name], label=name
            )
        if measure in zero_line:
            axis.axhline(0, color="#999999", linewidth=1)
        if measure in to_one:
            axis.set_ylim(min(-0.05, axis.get_ylim()[0]), 1.05)
        axis.set_title(measure.replace("_", " "), fontsize=9)
        _frame(axis, f"{step} (of each model, from 0)", "")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    return picture.getvalue()


def spread(layers: list[int]) -> list[int]:
    """Return all layers, or `MOST_PANELS` spread over them with the first and the last."""
    if len(layers) <= MOST_PANELS:
        return layers
    return [layers[round(place)] for place in np.linspace(0, len(layers) - 1, MOST_PANELS)]


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(max(width, 5.5), height), dpi=DPI)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10.5, x=0.01, ha="left", fontweight="bold")
    return figure


def _largest(values: Tensor) -> float:
    """Return the largest finite size of an entry."""
    return float(values.abs().nan_to_num(0.0).max())


def _bar(figure: Figure, axes: Any, colours: str, limits: tuple[float, float], label: str) -> None:
    bar = figure.colorbar(ScalarMappable(Normalize(*limits), colours), ax=axes, shrink=0.8, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _heat(axis: Axes, values: Any, colours: str, low: float, high: float) -> None:
    axis.set_facecolor("#cccccc")
    axis.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    for numbers, place in ((values.shape[1], axis.xaxis), (values.shape[0], axis.yaxis)):
        place.set_ticks(range(0, numbers, max(1, math.ceil(numbers / MOST_LABELLED))))
    axis.tick_params(labelsize=8, length=2)


def _write(axis: Axes, texts: Any, values: Any, limit: float | None, form: str) -> None:
    """Write the numbers into the cells, dark on light; `limit` is that of a diverging scale, None for viridis."""
    if max(values.shape) > MOST_LABELLED:
        return
    for i, k in zip(*np.nonzero(np.isfinite(values)), strict=True):
        dark = values[i, k] < 0.5 if limit is None else abs(values[i, k]) > 0.6 * limit
        colour = "white" if dark else "black"
        axis.text(k, i, form.format(texts[i, k]), ha="center", va="center", fontsize=7, color=colour)


def _density(axis: Axes, counts: Tensor, low: float, high: float, bins: int, name: str) -> None:
    heights = counts.double().reshape(bins, -1).sum(1)
    edges = np.linspace(low, high, bins + 1)
    shares = (heights / heights.sum().clamp(min=1)).numpy()
    axis.stairs(shares, edges, color=COLOURS[name], linestyle=STYLES[name], label=name, linewidth=1.3)


def _frame(axis: Axes, below: str, beside: str) -> None:
    axis.set_xlabel(below, fontsize=8)
    axis.set_ylabel(beside, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(color=GRID_COLOUR, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
