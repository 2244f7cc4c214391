"""Intermediate layers: which projection stands between the widths, and which distance is measured."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from term_references import pair_of, real, signal, squared_error, states, times

from layerdistill.core.types import LayerRef, Progress
from layerdistill.methods.ild import METHOD, IldConfig


def hidden(widths: tuple[int, int] = (4, 6), seed: int = 0, **options: Any) -> Any:
    stages = list(METHOD.stages(pair_of(widths=widths, seed=seed), IldConfig(**options)))
    assert [term.name for term in stages[0].terms] == ["task", "logits", "hidden"]
    return stages[0].terms[-1]


@pytest.mark.parametrize(
    ("widths", "options", "kind", "trained"),
    [
        ((4, 6), {}, "linear", 2 * 24),
        ((6, 6), {}, "identity", 0),
        ((6, 6), {"projection": "linear"}, "linear", 2 * 36),
        ((4, 6), {"shared_projection": True}, "linear", 24),
        ((4, 6), {"embeddings": True}, "linear", 3 * 24),
        ((4, 6), {"projection": "frozen_random"}, "frozen_random", 0),
        ((4, 6), {"projection": "orthogonal"}, "orthogonal", 2 * 24),
        ((4, 6), {"layer_map": [[2, 1], [2, 3]]}, "linear", 24),
        ((4, 6), {"projection_bias": True}, "linear", 2 * 30),
        ((4, 6), {"projection_bias": True, "shared_projection": True, "embeddings": True}, "linear", 30),
        ((6, 6), {"projection_bias": True, "projection": "linear"}, "linear", 2 * 42),
    ],
)
def test_the_projection_follows_widths_layers_and_options(
    widths: tuple[int, int], options: dict[str, Any], kind: str, trained: int
) -> None:
    term = hidden(widths, **options)
    assert term.projections["only"].kind == kind
    assert sum(parameter.numel() for parameter in term.parameters() if parameter.requires_grad) == trained


def test_a_shared_projection_is_one_map_for_all_pairs() -> None:
    term = hidden(shared_projection=True)
    ours = dict.fromkeys(states(4, 2, seed=1), states(4, 2, seed=1)[LayerRef("", 1)])
    theirs = dict.fromkeys(states(6, 4, seed=2), states(6, 4, seed=2)[LayerRef("", 1)])
    means = list(term(signal(ours), signal(theirs), {}, Progress()).values())
    assert means[0].value.item() == means[1].value.item()
    apart = list(hidden()(signal(ours), signal(theirs), {}, Progress()).values())
    assert apart[0].value.item() != apart[1].value.item()


def test_projections_are_drawn_from_the_seed() -> None:
    weights = [hidden(seed=seed).projections["only"].maps["1"].weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def cosine(one: list[float], other: list[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


@pytest.mark.parametrize("distance", ["mse", "relative_mse", "cosine", "normalised_mse"])
def test_the_distance_is_the_one_that_was_asked_for(distance: str) -> None:
    term = hidden((6, 6), distance=distance)
    ours, theirs = states(6, 2, seed=1), states(6, 4, seed=2)
    means = term(signal(ours), signal(theirs), {}, Progress())
    for student, teacher in ((1, 2), (2, 4)):
        x, y = real(ours[LayerRef("", student)]), real(theirs[LayerRef("", teacher)])
        cosines = [cosine(a, b) for a, b in zip(x, y, strict=True)]
        expected = {
            "mse": squared_error(x, y),
            "relative_mse": squared_error(x, y) / squared_error([[0.0] * 6] * len(y), y),
            "cosine": 1 - sum(cosines) / len(cosines),
            "normalised_mse": 2 - 2 * sum(cosines) / len(cosines),
        }[distance]
        assert means[f"hidden/{student}-{teacher}"].value.item() == pytest.approx(expected, rel=1e-5)


def test_identity_between_unequal_widths_is_refused() -> None:
    assert METHOD.problems(IldConfig(projection="identity"), pair_of(widths=(6, 6))) == []
    problems = METHOD.problems(IldConfig(projection="identity"), pair_of())
    assert len(problems) == 1
    assert "the student is [4] wide and the teacher [6]" in problems[0]
    assert "cka, which needs no projection" in problems[0]


def test_a_bias_is_added_and_is_refused_where_nothing_is_trained() -> None:
    term = hidden(projection_bias=True)
    with torch.no_grad():
        term.projections["only"].maps["1"].bias.fill_(2.0)
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    x, y = real(ours[LayerRef("", 1)]), real(theirs[LayerRef("", 2)])
    weight = term.projections["only"].maps["1"].weight.double().tolist()
    shifted = [[entry + 2.0 for entry in row] for row in times(x, weight)]
    value = term(signal(ours), signal(theirs), {}, Progress())["hidden/1-2"].value.item()
    assert value == pytest.approx(squared_error(shifted, y), rel=1e-5)

    assert METHOD.problems(IldConfig(projection_bias=True), pair_of()) == []
    for widths, options in (((6, 6), {}), ((4, 6), {"projection": "frozen_random"})):
        problems = METHOD.problems(IldConfig(projection_bias=True, **options), pair_of(widths=widths))
        assert len(problems) == 1
        assert "projection_bias is true" in problems[0]
