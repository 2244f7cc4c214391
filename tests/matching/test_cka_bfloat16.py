"""CKA under autocast to bfloat16: what is rounded, what is not, and states that try it."""

from __future__ import annotations

import pytest
import torch

from layerdistill.matching import cka_loss, cka_target

from . import references
from .test_cka import features, related


@pytest.mark.parametrize("rows", [64, 300, 1000])
@pytest.mark.parametrize("constant", ["student", "teacher"])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_under_autocast_too_a_side_that_does_not_vary_has_no_alignment(
    rows: int, constant: str, teacher_dtype: torch.dtype
) -> None:
    student, teacher = torch.randn(rows, 12), torch.randn(rows, 20).to(teacher_dtype)
    flat = student if constant == "student" else teacher
    flat[:] = 0.1 * flat[0]
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cka_loss(student, cka_target(teacher))
    found.value.backward()
    assert (found.total.item(), found.count.item()) == (0, 0)
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("form", ["feature", "gram"])
def test_autocast_rounds_what_is_multiplied_and_no_more(form: str) -> None:
    x, y = (side.float() for side in related(400, 96, 64))
    slopes, values = [], []
    for autocast in (False, True):
        student = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = cka_loss(student, y, form=form).value
            shared = cka_loss(student, cka_target(y), form=form).value
        assert loss.item() == shared.item()
        slopes.append(torch.autograd.grad(loss, student)[0])
        values.append(loss.item())
    assert values[0] != values[1]
    assert values[1] == pytest.approx(values[0], abs=1e-3)
    assert slopes[1].dtype == torch.float32
    assert (slopes[1] - slopes[0]).norm() < 0.01 * slopes[0].norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        equal = x.clone().requires_grad_()
        loss = cka_loss(equal, x, form=form).value
        loss.backward()
        assert loss.item() == 0
        assert equal.grad is not None
        assert not equal.grad.any()
        assert cka_loss(x, y, debiased=True, form=form).value.item() == pytest.approx(
            cka_loss(x.double(), y.double(), debiased=True).value.item(), abs=2e-6
        )


@pytest.mark.parametrize("autocast", [False, True])
def test_most_rows_may_be_one_token(autocast: bool) -> None:
    x, y = (side.float() for side in related(2000, 12, 8))
    for side in (x, y):
        side[torch.arange(2000) % 31 != 3] = side[0].clone()  # whatever rows are looked at first, nearly all are alike
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = cka_loss(x, cka_target(y)).value.item()
    expected = 1 - references.linear_cka(x.double().numpy(), y.double().numpy())
    assert found == pytest.approx(expected, rel=4e-3 if autocast else 1e-5)


@pytest.mark.parametrize("size", [10.0, 100.0])
def test_first_tokens_far_from_all_others_cost_no_precision(size: float) -> None:
    first = torch.arange(64 * 128) % 128 == 0  # of each of 64 texts, as states of a begin-of-text token are
    x, y = (side.float() for side in related(64 * 128, 48, 80))
    x[first, :2] += size
    y[first, 3:5] += size
    x, y = x.bfloat16(), y.bfloat16()  # what is asked about is the centring, not the rounding of what is given
    exact, rounded = x.double().requires_grad_(), x.float().requires_grad_()
    cka_loss(exact, y.double()).value.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cka_loss(rounded, cka_target(y)).value
    loss.backward()
    assert exact.grad is not None and rounded.grad is not None
    for rows in (first, ~first):
        assert (rounded.grad[rows] - exact.grad[rows]).norm() < 0.03 * exact.grad[rows].norm()


@pytest.mark.parametrize("form", ["feature", "gram"])
def test_equal_16_bit_states_are_exactly_aligned(form: str) -> None:
    for seed in range(5):
        x = features(300, 24, seed, offset=1.0).bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cka_loss(x, cka_target(x), form=form).value
        loss.backward()
        assert loss.item() == 0
        assert x.grad is not None and not x.grad.any()
