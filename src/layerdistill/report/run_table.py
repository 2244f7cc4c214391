"""What one finished run won and lost, as a table in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_result(result: Any, console: Console) -> None:
    """Print a `RunResult`: metrics and cost of student and teacher side by side, and how to load the student."""
    table = Table(title=f"{result.folder}", title_justify="left")
    for column in ("", "student", "teacher"):
        table.add_column(column, justify="left" if not column else "right")
    for name, value in result.metrics.items():
        table.add_row(name, shown(value), shown(result.teacher_metrics.get(name)))
    student, teacher = result.cost.get("student", {}), result.cost.get("teacher", {})
    for label, path, scale in COST_ROWS:
        if (value := find(student, path)) is not None:
            theirs = find(teacher, path)
            table.add_row(label, count(value * scale), count(theirs * scale) if theirs is not None else "")
    console.print(table)
    if not result.metrics:
        console.print("There are no metrics: data.validation and data.test are missing.")
    console.print(f"The student is in {result.student}; {how_to_open(result.student)}.", highlight=False)


def how_to_open(student: Path) -> str:
    """Return what opens a saved student; without trust_remote_code, one with a modelling file gets random blocks."""
    if any(student.glob("modeling_*.py")):
        return "layerdistill.load_student opens it, or plain transformers with trust_remote_code=True (not without)"
    return "plain transformers opens it"


COST_ROWS = (
    ("parameters", ("parameters", "total"), 1),
    ("of them embeddings", ("parameters", "embedding"), 1),
    ("MACs per token (millions)", ("macs_per_token",), 1e-6),
    ("latency, batch 1 (ms)", ("latency_ms", "1"), 1),
    ("latency, batch 32 (ms)", ("latency_ms", "32"), 1),
    ("peak memory of a forward (MB)", ("peak_memory_mb",), 1),
    ("size on disk (MB)", ("size_mb",), 1),
)
"""Label, place in the cost, and what the number is multiplied by."""


def find(cost: dict[str, Any], path: tuple[str, ...]) -> Any:
    """Return a value inside nested mappings, or None."""
    for key in path:
        if not isinstance(cost, dict) or key not in cost:
            return None
        cost = cost[key]
    return cost


def shown(value: float | None) -> str:
    """Return a metric with four digits, or a dash where it is undefined."""
    return "-" if value is None else f"{value:.4f}"


def count(value: float) -> str:
    """Return whole numbers with separators and others with one digit after the point."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
