"""What a diagnosis found, as tables: in the terminal, and as one Markdown page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import Tensor

MISSING = "–"


@dataclass(frozen=True)
class Grid:
    """A table of text; one that is not `brief` is left out of the terminal."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    brief: bool = True


@dataclass
class Finding:
    """What one part of a diagnosis found: its numbers (JSON), tables, figures by file name, and how to read them."""

    title: str
    data: dict[str, Any] = field(default_factory=dict)
    grids: list[Grid] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    reading: list[str] = field(default_factory=list)


def shown(value: float | None, places: int = 1) -> str:
    """Return a number with so many places, or a dash."""
    return MISSING if value is None or math.isnan(value) else f"{value:.{places}f}"


def matrix_grid(
    title: str, cells: Sequence[Sequence[str]], corner: str, rows: Sequence[str], columns: Sequence[str]
) -> Grid:
    """Return a matrix of text with its row and column names; `corner` says what they are."""
    return Grid(title, [corner, *columns], [[name, *line] for name, line in zip(rows, cells, strict=True)], brief=False)


def cells_with_null(values: Tensor, null: Tensor) -> list[list[str]]:
    """Return `angle (null)` for every entry but the diagonal's."""
    return [
        [
            "" if i == k else MISSING if torch.isnan(values[i, k]) else f"{values[i, k]:.1f} ({null[i, k]:.1f})"
            for k in range(values.shape[1])
        ]
        for i in range(values.shape[0])
    ]


def rich_table(grid: Grid) -> Table:
    """Return a grid for the terminal."""
    table = Table(title=grid.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, name in enumerate(grid.header):
        # Headers may break between words; words, numbers and names may not.
        header = name.replace("_", " ")
        width = max(len(piece) for piece in (*header.split(), *(row[number] for row in grid.rows)))
        table.add_column(Text(header), justify="right" if number else "left", min_width=width)
    for row in grid.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def markdown_grid(grid: Grid) -> str:
    """Return a grid as Markdown: its title in bold, then the table."""
    ruler = [":--", *["--:"] * (len(grid.header) - 1)]
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (grid.header, ruler, *grid.rows)]
    return f"**{grid.title}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_page(
    heading: str, about: Sequence[str], findings: Mapping[str, Finding], left_out: Mapping[str, str]
) -> str:
    """Return the whole diagnosis as one Markdown page that shows the figures beside it."""
    pieces = [f"# {heading}\n", "\n".join(about) + "\n"]
    for finding in findings.values():
        pieces.append(f"## {finding.title}\n")
        pieces += [sentence + "\n" for sentence in finding.reading]
        pieces += [f"![{name}]({name})\n" for name in finding.figures]
        pieces += [markdown_grid(grid) for grid in finding.grids]
    if left_out:
        pieces.append("## Left out\n")
        pieces += [f"{name}: {reason}.\n" for name, reason in left_out.items()]
    return "\n".join(pieces)
