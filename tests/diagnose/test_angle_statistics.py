"""Sums of angles over batches against loops in float64, and the released code's cosines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matching import references
from torch import Tensor

from layerdistill.matching.angles import (
    angle_null,
    angle_statistics,
    histogram_quantile,
    layer_angles,
    released_cosines,
)


def states(layers: int = 4, batch: int = 6, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    teacher = [(1 + i) * torch.randn(batch, 5, 7, generator=draw, dtype=torch.float64) + i for i in range(layers)]
    student = torch.randn(batch, 5, 7, generator=draw, dtype=torch.float64)
    mask = (torch.rand(batch, 5, generator=draw) > 0.3).long()
    mask[:, 0] = 1
    return teacher, student, mask


def angles_by_loop(first: Tensor, second: Tensor, student: Tensor, mask: Tensor) -> list[float]:
    rows = [references.real_tokens(layer.numpy(), mask.numpy()) for layer in (first, second, student)]
    return [math.degrees(math.acos(references.cosine(a - s, b - s))) for a, b, s in zip(*rows, strict=True)]


def test_statistics_are_what_loops_over_tokens_give() -> None:
    teacher, student, mask = states()
    found = angle_statistics(teacher, student, mask)
    for i in range(4):
        for k in range(4):
            if i == k:
                assert found.mean[i, i] == found.null[i, i] == 0
                continue
            angles = angles_by_loop(teacher[i], teacher[k], student, mask)
            assert found.tokens[i, k] == len(angles) == mask.sum()
            assert found.mean[i, k].item() == pytest.approx(np.mean(angles), rel=1e-10)
            assert found.fraction_acute[i, k].item() == pytest.approx(np.mean([a < 90 for a in angles]))
            expected = np.histogram(angles, bins=720, range=(0, 180))[0]
            assert found.histogram[i, k].tolist() == expected.tolist()
            for share in (0.25, 0.5, 0.75):
                lower, upper = (np.quantile(angles, share, method=how) for how in ("lower", "higher"))
                assert lower - 0.25 <= found.quantile(share)[i, k].item() <= upper + 0.25


def test_statistics_of_batches_add_up_to_those_of_all() -> None:
    teacher, student, mask = states()
    whole = angle_statistics(teacher, student, mask)
    parts = [angle_statistics([t[a:b] for t in teacher], student[a:b], mask[a:b]) for a, b in ((0, 1), (1, 4), (4, 6))]
    added = parts[0] + parts[1] + parts[2]
    for name in ("mean", "null", "fraction_acute", "histogram", "tokens"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert torch.equal(added.quantile(0.5), whole.quantile(0.5))
    torch.testing.assert_close(whole.mean, layer_angles(teacher, student, mask))
    torch.testing.assert_close(whole.null, angle_null(teacher, student, mask))


def test_padding_and_tokens_without_an_angle_do_not_count() -> None:
    teacher, student, mask = states()
    expected = angle_statistics(teacher, student, mask)
    for layer in (*teacher, student):
        layer[mask == 0] = math.nan
    assert torch.equal(angle_statistics(teacher, student, mask).mean, expected.mean)
    teacher[1][0, 0] = student[0, 0]
    found = angle_statistics(teacher, student, mask)
    assert found.tokens[1, 2] == mask.sum() - 1
    assert found.tokens[0, 2] == mask.sum()
    assert found.histogram.sum(-1).double().equal(found.tokens)
    angles = angles_by_loop(
        teacher[1], teacher[2], student, mask.clone().index_put_((torch.tensor(0),) * 2, torch.tensor(0))
    )
    assert found.mean[1, 2].item() == pytest.approx(np.mean(angles), rel=1e-10)


def test_quantiles_of_a_known_histogram() -> None:
    counts = torch.zeros(2, 180, dtype=torch.long)
    counts[0, 10], counts[0, 20] = 1, 3
    assert histogram_quantile(counts, 0.25)[0].item() == pytest.approx(11)
    assert histogram_quantile(counts, 0.5)[0].item() == pytest.approx(20 + 1 / 3)
    assert histogram_quantile(counts, 1.0)[0].item() == pytest.approx(21)
    assert histogram_quantile(counts, 0.5)[1].isnan()


def test_released_cosines_add_1e_6_and_count_padding() -> None:
    teacher, student, _ = states()
    teacher[0][2, 3] = student[2, 3]
    found = released_cosines(teacher[0], teacher[3], student)
    u, v = (layer.reshape(-1, 7).numpy() - student.reshape(-1, 7).numpy() for layer in (teacher[0], teacher[3]))
    expected = [sum(a * b) / (math.sqrt(sum(a * a)) * math.sqrt(sum(b * b)) + 1e-6) for a, b in zip(u, v, strict=True)]
    assert len(found) == 30, "every position, padding too"
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert found[13] == 0, "an angle that does not exist is 90 degrees there"
