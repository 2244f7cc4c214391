"""What `plan` says of a method whose stages can be made without data."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from layerdistill.core.needs import needs_during
from layerdistill.core.types import Progress, Stage, StagePreview


def preview_stages(stages: Iterable[Stage]) -> list[StagePreview]:
    """Return what is to be said of stages: terms with their coefficients, layer maps, helper parameters."""
    return [
        StagePreview(
            stage.name,
            [describe_term(term) for term in stage.terms],
            [layer_map for term in stage.terms for layer_map in getattr(term, "maps", [])],
            count_helpers(stage),
            training=stage.training,
            asks=partial(needs_during, stage.terms) if stage.teacher is None else None,
        )
        for stage in stages
    ]


def describe_term(term: Any) -> str:
    """Return a term's name with what it is multiplied by at the start."""
    coefficient = term.coefficient(term.name, Progress())
    per_pair = " per pair" if getattr(term, "per_pair", term.name == "hidden") else ""
    dtype = getattr(term, "dtype", None)
    products = "" if dtype is None else f" (products in {str(dtype).removeprefix('torch.')})"
    return f"{coefficient:g} × {term.name}{per_pair}{products}"


def count_helpers(stage: Stage) -> int:
    """Return how many parameters serve this stage's training only and are thrown away."""
    return sum(parameter.numel() for parameter in stage.terms.parameters())
