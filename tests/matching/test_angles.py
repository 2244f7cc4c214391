"""Angles between teacher layers as seen from the student, and the null they are to be compared with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.matching import angle_null, layer_angles

from . import references


def states(layers: int, width: int = 6, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = [(1 + i) * torch.randn(3, 4, width, generator=generator, dtype=torch.float64) + i for i in range(layers)]
    student = torch.randn(3, 4, width, generator=generator, dtype=torch.float64)
    return teacher, student, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])


def test_angles_are_the_equation_over_real_tokens() -> None:
    teacher, student, mask = states(3)
    tokens = [references.real_tokens(layer.numpy(), mask.numpy()) for layer in (*teacher, student)]
    for layer in (*teacher, student):
        layer[mask == 0] = math.nan
    found = layer_angles(teacher, student, mask)
    for i in range(3):
        for k in range(3):
            expected = 0.0 if i == k else references.mean_angle(tokens[i], tokens[k], tokens[3])
            assert found[i, k].item() == pytest.approx(expected, rel=1e-10)


def test_known_angles() -> None:
    teacher = [torch.tensor([[2.0, 1]]), torch.tensor([[1.0, 4]]), torch.tensor([[-3.0, 1]]), torch.tensor([[3.0, 3]])]
    found = layer_angles(teacher, torch.tensor([[1.0, 1]]))
    assert found[0].tolist() == pytest.approx([0, 90, 180, 45], abs=1e-4)
    assert torch.equal(found, found.T)


def test_a_token_where_teacher_and_student_are_equal_has_no_angle() -> None:
    teacher, student, mask = states(3)
    equal_at_one = [layer.clone() for layer in teacher]
    equal_at_one[1][0, 0] = student[0, 0]
    without = mask.clone()
    without[0, 0] = 0
    found = layer_angles(equal_at_one, student, mask)
    assert found[1, 2].item() == pytest.approx(layer_angles(teacher, student, without)[1, 2].item(), rel=1e-12)
    assert found[0, 2].item() == pytest.approx(layer_angles(teacher, student, mask)[0, 2].item(), rel=1e-12)
    copied = layer_angles([student, *teacher[1:]], student, mask)
    assert copied[0].isnan().all()
    assert copied[:, 0].isnan().all()
    assert copied[1:, 1:].isfinite().all()


def test_null_of_equal_norms_is_60_degrees_and_random_layers_meet_it() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4, 200, 768, generator=generator), dim=-1)
    null = angle_null(list(directions[:3]), directions[3])
    off_diagonal = ~torch.eye(3, dtype=torch.bool)
    assert torch.allclose(null[off_diagonal], torch.tensor(60.0), atol=1e-3)
    found = layer_angles(list(directions[:3]), directions[3])
    assert (found - null).abs().max() < 0.5
    assert torch.equal(null.diagonal(), torch.zeros(3))


def test_null_is_norm_matched() -> None:
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([0.5, 2.0, 5.0, 1.5]).reshape(4, 1, 1)
    drawn = torch.randn(4, 300, 2000, generator=generator) * scales
    found, null = (call(list(drawn[:3]), drawn[3]) for call in (layer_angles, angle_null))
    assert (found - null).abs().max() < 0.5
    s, t, u = (1.5**2, 0.5**2, 5.0**2)
    assert null[0, 2].item() == pytest.approx(math.degrees(math.acos(s / math.sqrt((t + s) * (u + s)))), abs=0.1)


def test_null_leaves_padding_out() -> None:
    teacher, student, mask = states(2)
    expected = angle_null(teacher, student, mask)
    for layer in (*teacher, student):
        layer[mask == 0] = math.nan
    assert torch.equal(angle_null(teacher, student, mask), expected)


def test_unequal_widths_and_no_layers_are_refused() -> None:
    teacher, student, mask = states(2)
    with pytest.raises(UserError, match="student's layer is 5 wide and a teacher's 6"):
        layer_angles(teacher, student[..., :5], mask)
    with pytest.raises(UserError, match="no teacher layers"):
        angle_null([], student, mask)
    with pytest.raises(UserError, match=r"\(3, 3, 6\)"):
        layer_angles([teacher[0][:, :3]], student, mask)
