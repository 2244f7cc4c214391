"""The comparison's numbers, its tables and its figure."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from layerdistill.core.errors import UserError
from layerdistill.report.comparison import (
    ComparisonRow,
    comparison_figure,
    comparison_table,
    markdown_table,
    mean_and_deviation,
    retained,
)

LARGE = {
    "parameters": {"total": 22_713_216, "embedding": 11_917_824},
    "latency_ms": {"1": 11.94, "32": 310.2},
    "size_mb": 90.87,
}
SMALL = {
    "parameters": {"total": 7_601_000, "embedding": 5_958_912},
    "latency_ms": {"1": 2.314, "32": 41.18},
    "size_mb": 30.5,
}
ROWS = [
    ComparisonRow.from_cost("teacher", {"accuracy": 0.9}, LARGE, is_teacher=True),
    ComparisonRow.from_cost("none", {"accuracy": [0.81, 0.83, 0.82]}, SMALL),
    ComparisonRow.from_cost("kd|v2 [x]", {"accuracy": [0.85, None, 0.87]}, SMALL),
    ComparisonRow.from_cost("failed", {"accuracy": None}, {}),
]


def rendered(rows: list[ComparisonRow], width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(comparison_table(rows))
    return console.file.getvalue()


def test_mean_and_deviation_with_n_minus_one() -> None:
    assert mean_and_deviation([1.0, 2.0, 6.0]) == pytest.approx((3.0, 7.0**0.5))
    assert mean_and_deviation([4.0]) == (4.0, None)
    assert mean_and_deviation([]) == (None, None)


def test_retained_share_of_the_teacher() -> None:
    assert retained(ROWS[1], ROWS, "accuracy") == pytest.approx(100 * 0.82 / 0.9)
    assert retained(ROWS[3], ROWS, "accuracy") is None
    assert retained(ROWS[1], ROWS[1:], "accuracy") is None
    lower = [
        ComparisonRow("t", {"perplexity": 20.0}, is_teacher=True),
        ComparisonRow("s", {"perplexity": [24.0, 26.0]}),
    ]
    assert retained(lower[1], lower, "perplexity") == pytest.approx(80.0)
    negative = [ComparisonRow("t", {"matthews": 0.5}, is_teacher=True), ComparisonRow("s", {"matthews": -0.1})]
    assert retained(negative[1], negative, "matthews") is None


def test_markdown_holds_the_numbers() -> None:
    assert markdown_table(ROWS).splitlines() == [
        "| model | accuracy | retained % | params (M) | latency (ms) batch 1 | latency (ms) batch 32 | size (MB) |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
        "| teacher | 0.9000 | 100.0 | 22.7 | 11.9 | 310 | 90.9 |",
        "| none | 0.8200 ± 0.0100 | 91.1 | 7.60 | 2.31 | 41.2 | 30.5 |",
        "| kd\\|v2 [x] | 0.8600 ± 0.0141 | 95.6 | 7.60 | 2.31 | 41.2 | 30.5 |",
        "| failed | – | – | – | – | – | – |",
    ]
    alone = [ComparisonRow("s", {"perplexity": [24.0, 26.0], "accuracy": 0.5})]
    assert (
        markdown_table(alone)
        == "| model | perplexity | accuracy |\n| :-- | --: | --: |\n| s | 25.00 ± 1.41 | 0.5000 |\n"
    )


def test_the_terminal_table_is_whole_in_80_columns() -> None:
    two = [replace(row, metrics={**row.metrics, "macro_f1": 0.7654}) for row in ROWS]
    for rows in (ROWS, two):
        text = rendered(rows, 80)
        for number in ("0.9000", "0.0141", "91.1", "22.7", "2.31", "41.2", "90.9"):
            assert number in text
    assert "0.8200 ± 0.0100" in rendered(ROWS, 140)
    assert "kd|v2 [x]" in rendered(ROWS, 140)


def ink(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    """How many pixels have exactly this colour."""
    return int((np.round(picture[..., :3] * 255).astype(int) == colour).all(axis=-1).sum())


def test_the_figure_is_a_png_of_the_right_size_with_dots_and_bars(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    path = tmp_path / "new" / "comparison.png"
    comparison_figure(ROWS, path, title="a title")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    whole = imread(path)
    assert whole.shape[:2] == (round(200 * (1.5 + 0.45 * len(ROWS))), 2400)
    assert dict(mpl.rcParams) == before
    blue, grey = (0x00, 0x72, 0xB2), (0x66, 0x66, 0x66)
    assert ink(whole, blue) > 10_000
    assert ink(whole, grey) > 10_000
    comparison_figure([ComparisonRow(row.name, row.metrics) for row in ROWS[1:]], path)
    bare = imread(path)
    assert ink(bare, grey) < 1000  # the edges of letters
    assert 0 < ink(bare, blue) < 10_000
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_nothing_to_draw_is_said_so(tmp_path: Path) -> None:
    for rows, metric in (([], None), (ROWS[3:], None), (ROWS, "f1")):
        with pytest.raises(UserError, match="nothing to draw"):
            comparison_figure(rows, tmp_path / "figure.png", metric)
    assert list(tmp_path.iterdir()) == []


def test_a_report_needs_neither_torch_nor_pyplot() -> None:
    code = (
        "import sys, layerdistill.report.comparison; "
        "print([n for n in ('torch', 'transformers', 'sklearn', 'matplotlib.pyplot') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
