"""The distance after a linear map, with its gradient written out, in float64 and in 16-bit products."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.matching import LinearMap, masked_mse, projected, projected_mse
from layerdistill.matching.projected import linear_product
from layerdistill.matching.rows import as_factor

WIDTHS = 5, 8


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sides(rows: int, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, LinearMap, Tensor]:
    """States and map with gradients, and a teacher that the map is half right about."""
    student = draw(rows, WIDTHS[0], seed=1, dtype=dtype)
    weight = draw(*WIDTHS[::-1], seed=2, dtype=dtype)
    teacher = student @ weight.T / 2 + draw(rows, WIDTHS[1], seed=3, dtype=dtype)
    given = [student, weight, *([draw(WIDTHS[1], seed=4, dtype=dtype)] if bias else [])]
    student, *parts = (tensor.requires_grad_() for tensor in given)
    return student, LinearMap(*parts), teacher.detach()


def by_hand(student: Tensor, linear: LinearMap, teacher: Tensor, relative: bool) -> Tensor:
    """The definition, for autograd: the mean over rows and columns."""
    made = student @ linear.weight.T + (0 if linear.bias is None else linear.bias)
    return (made - teacher).square().mean() / (teacher.square().mean() if relative else 1)


def gradients(value: Tensor, student: Tensor, linear: LinearMap) -> list[Tensor]:
    return list(torch.autograd.grad(value, [tensor for tensor in (student, *linear) if tensor is not None]))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("relative", [False, True], ids=["mse", "relative"])
def test_value_and_gradients_are_those_of_the_definition(bias: bool, relative: bool) -> None:
    student, linear, teacher = sides(7, bias)
    found, asked = projected_mse(student, linear, teacher, relative), by_hand(student, linear, teacher, relative)
    assert found.count.item() == 7
    torch.testing.assert_close(found.value, asked, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(found.value, student, linear), gradients(asked, student, linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("rows", [1, 255, 256, 300])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_under_autocast_it_is_the_same_to_the_precision_of_bfloat16(
    rows: int, bias: bool, teacher_dtype: torch.dtype
) -> None:
    student, linear, teacher = sides(rows, bias, torch.float32)
    asked = by_hand(student, linear, teacher, False)
    with torch.autocast("cpu", torch.bfloat16):
        found = projected_mse(student, linear, teacher.to(teacher_dtype))
    assert found.count.item() == rows, "rows of zeros that make their number round count for nothing"
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.value, asked, rtol=2e-2, atol=0)
    pairs = zip(gradients(found.value, student, linear), gradients(asked, student, linear), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_kept_until_the_backward_but_the_gradients(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def noted(*args: Any, **options: Any) -> Tensor:
        factor = as_factor(*args, **options)
        made.append(weakref.ref(factor))
        return factor

    monkeypatch.setattr(projected, "as_factor", noted)
    student, linear, teacher = sides(300, bias=True, dtype=torch.float32)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.shape), lambda _: None),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        loss = projected_mse(student, linear, teacher)
    assert [shape for shape in kept if shape] == [(300, 5), (8, 5), (8,)]
    assert loss.total.requires_grad and len(made) == 2
    assert made[1]() is None, "the difference, of the teacher's width, is gone"


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    student, linear, teacher = sides(300, bias=True, dtype=torch.float32)
    kept = []
    with torch.no_grad():
        monkeypatch.setattr(
            torch.autograd.function.FunctionCtx, "save_for_backward", lambda _, *saved: kept.extend(saved)
        )
        projected_mse(student, linear, teacher)
    assert kept == [None, None, None]


def test_what_is_close_is_subtracted_before_it_is_rounded() -> None:
    """A product that was rounded to 8 bits before the subtraction would be off by as much as the difference."""
    student = draw(256, 64, seed=1).bfloat16().float()
    weight = draw(32, 64, seed=2).bfloat16().float()
    exact = student.double() @ weight.double().T
    teacher = exact.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = projected_mse(student, LinearMap(weight), teacher)
    assert found.value.item() == pytest.approx((exact - teacher.double()).square().mean().item(), rel=1e-2)


def test_float16_cannot_hold_every_state_so_nothing_is_rounded_to_it() -> None:
    student, linear, teacher = sides(4, True, torch.float32)
    teacher[0, 0] = 1e6
    with torch.autocast("cpu", torch.float16):
        found = projected_mse(student, linear, teacher)
        large = linear_product(1e6 * student, linear)
    assert torch.equal(large, linear_product(1e6 * student, linear))
    assert found.value.item() == pytest.approx(by_hand(student, linear, teacher, False).item(), rel=1e-6)


@pytest.mark.parametrize("relative", [False, True])
def test_no_gradient_reaches_the_teacher(relative: bool) -> None:
    student, linear, teacher = sides(4, True)
    teacher.requires_grad_()
    projected_mse(student, linear, teacher, relative).value.backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_the_norm_of_one_token_is_off_by_less_than_a_percent() -> None:
    for seed in range(50):
        student, weight = draw(1, 16, seed=seed).bfloat16().float(), draw(12, 16, seed=-seed).bfloat16().float()
        with torch.autocast("cpu", torch.bfloat16):
            found = projected_mse(student, LinearMap(weight), torch.zeros(1, 12))
        exact = (student.double() @ weight.double().T).bfloat16().double().square().mean()
        assert found.value.item() == pytest.approx(exact.item(), rel=8e-3)


def test_no_rows_give_nothing() -> None:
    student, linear, teacher = sides(0, True, torch.float32)
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            found = projected_mse(student, linear, teacher)
        assert (found.total.item(), found.count.item()) == (0, 0)
        assert not any(gradient.any() for gradient in gradients(found.value, student, linear))


@pytest.mark.parametrize("shape", [(9, 5), (2, 3, 5)], ids=["rows", "batch"])
def test_a_product_under_autocast_has_rounded_factors(shape: tuple[int, ...]) -> None:
    student = draw(*shape, seed=1, dtype=torch.float32).requires_grad_()
    _, linear, _ = sides(1, True, torch.float32)
    asked = linear_product(student, linear)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_product(student, linear)
    assert found.dtype == torch.float32
    assert found.shape == asked.shape
    rounded = student.detach().bfloat16() @ linear.weight.detach().bfloat16().T
    assert torch.equal(found, rounded.float() + linear.bias), "the bias is not rounded"
    weights = draw(*found.shape, seed=6, dtype=torch.float32)
    pairs = (gradients((given * weights).sum(), student, linear) for given in (found, asked))
    for ours, theirs in zip(*pairs, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_shapes_that_do_not_fit_are_refused_as_by_the_distance_alone() -> None:
    student, linear, teacher = sides(3, False)
    for wrong, message in ((teacher[:2], "all axes but the last"), (teacher[:, :2], "8 wide and the teacher's 2")):
        with pytest.raises(UserError, match=message):
            projected_mse(student, linear, wrong)
        with pytest.raises(UserError, match=message):
            masked_mse(linear_product(student, linear), wrong)
