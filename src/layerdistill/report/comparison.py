"""Models side by side: how good each is over its seeds, and what it costs; as a table, in Markdown, as a figure."""

from __future__ import annotations

import io
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from layerdistill.core.errors import UserError
from layerdistill.core.files import explained_disk_errors, write_bytes
from layerdistill.evaluate.config import LOWER_IS_BETTER

Values = float | None | Sequence[float | None]
"""One seed's value, or one value per seed; None where the metric was undefined."""

MISSING = "–"
STUDENT_COLOUR = "#0072B2"
"""Blue of the palette of Okabe and Ito (2008), which all kinds of colour vision tell from the teacher's grey."""
TEACHER_COLOUR = "#666666"
TEXT_COLOUR = "#222222"
GRID_COLOUR = "#dddddd"
NAME_WIDTH = 26
"""Characters of a name in one line of the figure."""
FIGURE_WIDTH = 12.0
"""Inches; 2400 pixels at `FIGURE_DPI`, text readable when shown at half of that."""
FIGURE_DPI = 200


@dataclass(frozen=True)
class ComparisonRow:
    """One model or method: its metrics over seeds and its cost.

    `latency_ms` maps a batch size, as text, to milliseconds. The other models retain a share of the teacher's metrics;
    `chance` (the teacher's row has it) is what the best constant answer gets. `thrown_away` counts the parameters that
    only the training used.
    """

    name: str
    metrics: Mapping[str, Values]
    parameters: int | None = None
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    size_mb: float | None = None
    is_teacher: bool = False
    chance: Mapping[str, float] = field(default_factory=dict)
    thrown_away: int | None = None

    @classmethod
    def from_cost(
        cls,
        name: str,
        metrics: Mapping[str, Values],
        cost: Mapping[str, Any],
        is_teacher: bool = False,
        chance: Mapping[str, float] | None = None,
        thrown_away: int | None = None,
    ) -> ComparisonRow:
        """Make a row of metrics and of a cost as `evaluate.cost.measure_cost` gives it (empty where not measured)."""
        parameters = cost.get("parameters", {}).get("total")
        return cls(
            name, metrics, parameters, cost.get("latency_ms", {}), cost.get("size_mb"), is_teacher, chance or {},
            thrown_away,
        )  # fmt: skip

    def seeds(self, metric: str) -> list[float]:
        """Return the defined values of `metric`, one per seed."""
        given = self.metrics.get(metric)
        several = given if isinstance(given, Sequence) else [given]
        return [float(value) for value in several if value is not None]


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and the standard deviation with n - 1; None where there are too few values (0; 0 or 1)."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def retained(row: ComparisonRow, rows: Sequence[ComparisonRow], metric: str) -> float | None:
    """Return the mean of `row` as percent of the teacher's; the ratio is reversed where lower is better.

    None without a teacher, or when either mean is not above zero: a share of a negative correlation means nothing.
    """
    mean, _ = mean_and_deviation(row.seeds(metric))
    teacher, _ = mean_and_deviation([value for other in rows if other.is_teacher for value in other.seeds(metric)])
    if mean is None or teacher is None or mean <= 0 or teacher <= 0:
        return None
    return 100.0 * (teacher / mean if metric in LOWER_IS_BETTER else mean / teacher)


def retained_above_chance(row: ComparisonRow, rows: Sequence[ComparisonRow], metric: str) -> float | None:
    """Return `100 (m - c) / (m_teacher - c)`, c being what the best constant answer gets; perplexities as logarithms.

    Negative where a model is worse than a constant. None without a teacher that is better than chance.
    """
    mean, _ = mean_and_deviation(row.seeds(metric))
    teachers = [other for other in rows if other.is_teacher]
    teacher, _ = mean_and_deviation([value for other in teachers for value in other.seeds(metric)])
    chance = next((other.chance[metric] for other in teachers if metric in other.chance), None)
    if mean is None or teacher is None or chance is None:
        return None
    if metric == "perplexity":
        mean, teacher, chance = math.log(mean), math.log(teacher), math.log(chance)
    room = chance - teacher if metric in LOWER_IS_BETTER else teacher - chance
    gained = chance - mean if metric in LOWER_IS_BETTER else mean - chance
    return 100.0 * gained / room if room > 0 else None


def comparison_table(rows: Sequence[ComparisonRow], title: str | None = None) -> Table:
    """Return a table for the terminal: one line per row, in the order given; `retained` is that of the first metric."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    header, lines = _cells(rows)
    for number, name in enumerate(header):
        # Narrow headers, and no number ever broken, leave room for the names in 80 columns.
        width = max(len(piece) for line in lines for piece in line[number].split()) if number else None
        table.add_column(Text(name), justify="right" if number else "left", min_width=width)
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*[Text(cell) for cell in line], style="dim" if row.is_teacher else None)
    return table


def markdown_table(rows: Sequence[ComparisonRow]) -> str:
    """Return the same table as Markdown, ending in a newline."""
    header, lines = _cells(rows)
    ruler = [":--", *["--:"] * (len(header) - 1)]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (header, ruler, *lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def comparison_figure(
    rows: Sequence[ComparisonRow], path: Path, metric: str | None = None, title: str | None = None
) -> None:
    """Write a PNG: the mean of `metric` (none given: the first row's first) and every seed, next to it bars of cost.

    Error bars are one standard deviation (n - 1). The dashed line is the teacher. Cost that no row has gets no panel.
    2400 pixels wide. matplotlib's global state is not touched. Raises UserError when no row has a value of `metric`.
    """
    chosen = metric if metric is not None else next(iter(rows[0].metrics), "") if rows else ""
    if not any(row.seeds(chosen) for row in rows):
        raise UserError(f"there is nothing to draw: no model has a value of the metric {chosen!r}.")
    panels = _cost_columns(rows)
    figure = Figure(figsize=(FIGURE_WIDTH, 1.5 + 0.45 * len(rows)), dpi=FIGURE_DPI)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, wspace=0.0)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(panels), width_ratios=[3.2, *[1.0] * len(panels)], squeeze=False)[0]
    _draw_metric(axes[0], rows, chosen)
    for axis, (label, values) in zip(axes[1:], panels, strict=True):
        _draw_bars(axis, rows, label, values)
    if title:
        figure.suptitle(title, fontsize=13, color=TEXT_COLOUR, x=0.012, ha="left", fontweight="bold")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with explained_disk_errors(path.name, path.parent):
        write_bytes(path, picture.getvalue())


def _draw_metric(axis: Axes, rows: Sequence[ComparisonRow], metric: str) -> None:
    beside = axis.get_yaxis_transform()
    for height, row in enumerate(rows):
        values, colour = row.seeds(metric), _colour(row)
        mean, deviation = mean_and_deviation(values)
        axis.text(
            1.03, height, _number_with_deviation(values), transform=beside, va="center", fontsize=10, color=TEXT_COLOUR
        )
        if mean is None:
            axis.text(
                0.5, height, "undefined", transform=beside, ha="center", va="center", fontsize=10, color=TEXT_COLOUR
            )
            continue
        axis.errorbar(mean, height, xerr=deviation, fmt="o", markersize=7.5, color=colour, elinewidth=1.6, capsize=3.5)
        if len(values) > 1:
            axis.scatter(values, [height + 0.27] * len(values), s=16, color=colour, linewidths=0, alpha=0.55)
    level, _ = mean_and_deviation([value for row in rows if row.is_teacher for value in row.seeds(metric)])
    if level is not None:
        axis.axvline(level, color=TEACHER_COLOUR, linestyle=(0, (4, 3)), linewidth=1.2, zorder=0)
    better = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
    _style(axis, rows, f"{metric.replace('_', ' ')}\n({better})")
    names = ["\n".join(textwrap.wrap(row.name, NAME_WIDTH)) for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=11)
    axis.margins(x=0.06)
    axis.grid(axis="x", color=GRID_COLOUR, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(axis="x", labelsize=9.5, length=0, labelcolor=TEXT_COLOUR)
    if any(len(row.seeds(metric)) > 1 for row in rows):
        note = "small dots: seeds; large dot and bar: mean ± standard deviation"
        axis.set_xlabel(note, fontsize=9.5, color=TEXT_COLOUR, labelpad=7)


def _draw_bars(axis: Axes, rows: Sequence[ComparisonRow], label: str, values: Sequence[float | None]) -> None:
    widest = max(value for value in values if value is not None) or 1.0
    for height, (row, value) in enumerate(zip(rows, values, strict=True)):
        axis.barh(height, value or 0.0, height=0.5, color=_colour(row))
        axis.text((value or 0.0) + 0.05 * widest, height, _number(value), va="center", fontsize=10, color=TEXT_COLOUR)
    _style(axis, rows, label)
    axis.set_xlim(0, 1.6 * widest)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines["left"].set_visible(True)
    axis.spines["left"].set_color("#999999")


def _style(axis: Axes, rows: Sequence[ComparisonRow], title: str) -> None:
    for line, rise in zip(title.split("\n"), (25, 9), strict=True):
        axis.annotate(
            line,
            (0, 1),
            (0, rise),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=11,
            color=TEXT_COLOUR,
        )
    axis.set_ylim(len(rows) - 0.45, -0.55)
    axis.tick_params(axis="y", length=0, labelcolor=TEXT_COLOUR)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _colour(row: ComparisonRow) -> str:
    return TEACHER_COLOUR if row.is_teacher else STUDENT_COLOUR


def _cells(rows: Sequence[ComparisonRow]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    costs = _cost_columns(rows)
    header = ["model", *names, *(label for label, _ in costs)]
    compared = bool(names) and any(row.is_teacher for row in rows)
    if compared:
        header.insert(2, "retained\n%")
    above_chance = compared and any(row.chance for row in rows)
    if above_chance:
        header.insert(3, "above chance\n%")
    lines = []
    for number, row in enumerate(rows):
        line = [row.name, *(_number_with_deviation(row.seeds(name)) for name in names)]
        if compared:
            share = retained(row, rows, names[0])
            line.insert(2, MISSING if share is None else f"{share:.1f}")
        if above_chance:
            above = retained_above_chance(row, rows, names[0])
            line.insert(3, MISSING if above is None else f"{above:.1f}")
        lines.append([*line, *(_number(values[number]) for _, values in costs)])
    return header, lines


def _cost_columns(rows: Sequence[ComparisonRow]) -> list[tuple[str, list[float | None]]]:
    """Return a label of two lines and the values, for each cost that some row has."""
    batches = sorted({int(batch) for row in rows for batch in row.latency_ms})
    millions = [row.parameters / 1e6 if row.parameters is not None else None for row in rows]
    columns = [("params\n(M)", millions)]
    for batch in batches:
        columns.append((f"latency (ms)\nbatch {batch}", [row.latency_ms.get(str(batch)) for row in rows]))
    columns.append(("size\n(MB)", [row.size_mb for row in rows]))
    columns.append(("thrown\naway", [row.thrown_away for row in rows]))
    return [(label, values) for label, values in columns if any(value is not None for value in values)]


def _number_with_deviation(values: Sequence[float]) -> str:
    mean, deviation = mean_and_deviation(values)
    if mean is None:
        return MISSING
    places = 4 if abs(mean) < 10 else 2
    return f"{mean:.{places}f}" + (f" ± {deviation:.{places}f}" if deviation is not None else "")


def _number(value: float | None) -> str:
    """Return three significant digits, or all digits before the point."""
    if value is None:
        return MISSING
    places = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(places, 3)}f}"
