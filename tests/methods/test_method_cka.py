"""Centred kernel alignment: what its form and debiasing do in the term, and that it needs no projection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from term_references import pair_of, signal, states

from layerdistill.core.types import LayerRef, Progress
from layerdistill.methods.cka import METHOD, CkaConfig
from layerdistill.methods.table import METHODS
from layerdistill.recipe import load_recipe


def hidden(**options: Any) -> Any:
    return next(iter(METHOD.stages(pair_of(), CkaConfig(**options)))).terms[-1]


def values(ours: dict[LayerRef, torch.Tensor], theirs: dict[LayerRef, torch.Tensor], **options: Any) -> list[float]:
    means = hidden(**options)(signal(ours), signal(theirs), {}, Progress())
    return [mean.value.item() for mean in means.values()]


def test_there_is_nothing_to_train_beside_the_student() -> None:
    assert list(hidden().parameters()) == []


def test_a_rotated_and_scaled_student_has_nothing_to_learn() -> None:
    theirs = states(6, 4, seed=2)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    ours = {LayerRef("", k): 3 * theirs[LayerRef("", 2 * k)] @ rotation + 5 for k in (1, 2)}
    assert values(ours, theirs) == pytest.approx([0.0, 0.0], abs=1e-5)
    mixed = {layer: tensor * torch.arange(1.0, 7.0) for layer, tensor in ours.items()}
    assert min(values(mixed, theirs)) > 1e-3, "but not any linear map"


def test_forms_and_debiasing_are_different_numbers() -> None:
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    plain, root, debiased = (values(ours, theirs, **options) for options in ({}, {"form": "sqrt"}, {"debiased": True}))
    for p, r, d in zip(plain, root, debiased, strict=True):
        assert 1 - r == pytest.approx((1 - p) ** 0.5, rel=1e-5)
        assert d > p, "unrelated states of ten tokens look alike unless the bias is taken away"


def test_the_root_of_what_can_be_negative_is_refused() -> None:
    assert METHOD.problems(CkaConfig(debiased=True), pair_of()) == []
    problems = METHOD.problems(CkaConfig(form="sqrt", debiased=True), pair_of())
    assert len(problems) == 1
    assert "debiased CKA can be negative" in problems[0]


def test_what_the_released_code_does_is_a_recipe() -> None:
    """The docs say that these options undo the deviations: they must exist."""
    options = {"form": "sqrt", "embeddings": True, "reduce": "sum", "temperature": 1.0}
    recipe = load_recipe(
        {
            "teacher": {"model": "teacher"},
            "student": {"num_blocks": 2},
            "data": {"task": "causal-lm", "train": "train.txt"},
            "method": {"name": "cka", **options},
        }
    )
    assert all(getattr(recipe.method, name) == value for name, value in options.items())
    for name in options:
        assert f"{name}:" in (type(METHODS["cka"]).__doc__ or "")
