"""What holds for every loss: its equation, padding, equality, sums of micro-batches, precision, gradients, shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import Mean
from layerdistill.matching import (
    LinearMap,
    binary_kl,
    cka_loss,
    cosine_loss,
    forward_kl,
    js_divergence,
    layer_norm_mse,
    logit_mse,
    masked_mse,
    normalised_mse,
    projected_mse,
    reverse_kl,
    soft_cross_entropy,
)

from . import references

TEMPERATURE = 2.5


def rows(tokens: list[np.ndarray]) -> np.ndarray:
    return np.stack(tokens)


class Loss(NamedTuple):
    """A loss with its reference on lists of real tokens; `adds_up` where parts of a batch add to the whole.

    `autocast_error` is what may be lost, relatively, under autocast to bfloat16.
    """

    call: Callable[..., Mean]
    reference: Callable[[list[np.ndarray], list[np.ndarray]], float]
    adds_up: bool = True
    zero_at_equality: bool = True
    autocast_error: float = 2e-5


LOSSES = {
    "masked_mse": Loss(masked_mse, references.masked_mse),
    "masked_mse/teacher": Loss(
        partial(masked_mse, divide_by_teacher=True),
        lambda s, t: references.masked_mse(s, t) / (rows(t) ** 2).mean(),
        adds_up=False,
    ),
    "cosine_loss": Loss(cosine_loss, references.cosine_loss),
    "normalised_mse": Loss(normalised_mse, references.normalised_mse),
    "layer_norm_mse": Loss(partial(layer_norm_mse), references.layer_norm_mse, adds_up=False),
    **{
        f"{function.__name__}/{temperature}": Loss(
            partial(function, temperature=temperature), partial(reference, temperature=temperature)
        )
        for function, reference in (
            (forward_kl, references.forward_kl),
            (reverse_kl, references.reverse_kl),
            (js_divergence, references.js_divergence),
            (binary_kl, references.binary_kl),
        )
        for temperature in (1.0, TEMPERATURE)
    },
    "soft_cross_entropy": Loss(
        partial(soft_cross_entropy, temperature=TEMPERATURE),
        partial(references.soft_cross_entropy, temperature=TEMPERATURE),
        zero_at_equality=False,
    ),
    "logit_mse": Loss(partial(logit_mse, temperature=TEMPERATURE), references.masked_mse),
    **{
        f"cka/{form}{'/sqrt' * sqrt}{'/debiased' * debiased}": Loss(
            partial(cka_loss, form=form, sqrt=sqrt, debiased=debiased),
            partial(
                lambda s, t, root, unbiased: (
                    1
                    - (references.debiased_cka if unbiased else references.linear_cka)(rows(s), rows(t))
                    ** (0.5 if root else 1)
                ),
                root=sqrt,
                unbiased=debiased,
            ),
            adds_up=False,
            autocast_error=2e-5 if debiased else 4e-3,
        )
        for form in ("feature", "gram")
        for sqrt, debiased in ((False, False), (True, False), (False, True))
    },
}

ADDITIVE = {name: loss for name, loss in LOSSES.items() if loss.adds_up}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def example(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher `(3, 5, 6)` and a mask with 10 real tokens, in the middle as well as at the ends."""
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(3, 5, 6, generator=generator, dtype=torch.float64) + 0.5
    teacher = 3 * torch.randn(3, 5, 6, generator=generator, dtype=torch.float64) - 1
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1]])
    return student.to(dtype), teacher.to(dtype), mask


def gradient(call: Callable[..., Mean], student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    student = student.clone().requires_grad_()
    call(student, teacher, mask).value.backward()
    assert student.grad is not None
    return student.grad


@each_loss
def test_value_is_the_equation_over_real_tokens(loss: Loss) -> None:
    student, teacher, mask = example()
    expected = loss.reference(
        references.real_tokens(student.numpy(), mask.numpy()), references.real_tokens(teacher.numpy(), mask.numpy())
    )
    mean = loss.call(student, teacher, mask)
    assert mean.value.item() == pytest.approx(expected, rel=1e-10)
    assert mean.total.shape == mean.count.shape == ()
    assert mean.total.dtype == mean.count.dtype == torch.float64
    assert mean.count.item() == (10 if loss.adds_up or loss.call.func in (masked_mse, layer_norm_mse) else 1)  # type: ignore[attr-defined]


@each_loss
def test_padding_reaches_neither_value_nor_gradient(loss: Loss) -> None:
    student, teacher, mask = example()
    padding = mask == 0
    for garbage_s, garbage_t in ((math.nan, math.nan), (math.inf, -math.inf), (math.nan, 1e30)):
        bad_student, bad_teacher = student.clone(), teacher.clone()
        bad_student[padding], bad_teacher[padding] = garbage_s, garbage_t
        assert torch.equal(loss.call(bad_student, bad_teacher, mask).total, loss.call(student, teacher, mask).total)
        clean, dirty = gradient(loss.call, student, teacher, mask), gradient(loss.call, bad_student, bad_teacher, mask)
        assert torch.equal(clean, dirty)
        assert not dirty[padding].any()
        assert dirty[~padding].any()


@each_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_non_finite_real_tokens_are_not_hidden(loss: Loss, bad: float, side: str) -> None:
    student, teacher, mask = example()
    (student if side == "student" else teacher)[1, 0, 2] = bad
    assert not loss.call(student, teacher, mask).value.isfinite()


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_sides_give_exactly_zero_and_no_gradient(loss: Loss, dtype: torch.dtype) -> None:
    student, _, mask = example(dtype=dtype)
    value = loss.call(student, student.clone(), mask).value
    slope = gradient(loss.call, student, student.clone(), mask)
    if loss.zero_at_equality:
        assert value.item() == 0
    assert not slope.isnan().any()
    assert not slope.any()


@each_loss
def test_gradient_is_that_of_the_value(loss: Loss) -> None:
    student, teacher, mask = example()
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss.call(s, teacher, mask).value, (student,))


@each_loss
def test_the_teacher_gets_no_gradient(loss: Loss) -> None:
    student, teacher, mask = example()
    student.requires_grad_()
    teacher.requires_grad_()
    loss.call(student, teacher, mask).value.backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("loss", ADDITIVE.values(), ids=ADDITIVE.keys())
def test_parts_added_are_the_whole(loss: Loss) -> None:
    student, teacher, mask = example()
    whole = loss.call(student, teacher, mask)
    parts = [loss.call(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1]) for i in range(3)]
    added = parts[0] + parts[1] + parts[2]
    assert added.count.item() == whole.count.item()
    assert added.value.item() == pytest.approx(whole.value.item(), rel=1e-13)
    average_of_averages = sum(part.value.item() for part in parts) / 3
    assert average_of_averages != pytest.approx(whole.value.item(), rel=1e-3)


@each_loss
def test_flat_rows_and_a_mask_are_two_ways_to_say_the_same(loss: Loss) -> None:
    student, teacher, mask = example()
    whole = loss.call(student, teacher, mask)
    flat = loss.call(student[mask.bool()], teacher[mask.bool()])
    flat_with_mask = loss.call(student.flatten(0, 1), teacher.flatten(0, 1), mask.flatten().bool())
    for other in (flat, flat_with_mask):
        assert torch.equal(other.total, whole.total)
        assert torch.equal(other.count, whole.count)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher, mask = example(dtype=dtype)
    exact = loss.call(student.double(), teacher.double(), mask).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = loss.call(student, teacher, mask)
    assert mean.total.dtype == mean.count.dtype == torch.float32
    assert mean.value.item() == pytest.approx(exact.item(), rel=loss.autocast_error)
    assert gradient(loss.call, student, teacher, mask).dtype == dtype


@each_loss
def test_nothing_counted_is_zero_without_gradient(loss: Loss) -> None:
    student, teacher, mask = example()
    mean = loss.call(student, teacher, torch.zeros_like(mask))
    assert mean.count.item() == 0
    assert mean.value.item() == 0
    slope = gradient(loss.call, student, teacher, torch.zeros_like(mask))
    assert torch.equal(slope, torch.zeros_like(slope))


@each_loss
def test_shapes_that_do_not_fit_are_refused(loss: Loss) -> None:
    student, teacher, mask = example()
    with pytest.raises(UserError, match=r"the mask has shape \(3, 4\).*\(3, 5\)"):
        loss.call(student, teacher, mask[:, :4])
    with pytest.raises(UserError, match=r"\(3, 4, 6\)"):
        loss.call(student, teacher[:, :4], mask)


def test_divided_by_teacher_is_one_for_a_student_of_zeros_and_kind_to_a_teacher_of_zeros() -> None:
    student, teacher, mask = example()
    assert masked_mse(0 * student, teacher, mask, divide_by_teacher=True).value.item() == pytest.approx(1, rel=1e-12)
    plain = masked_mse(student, 0 * teacher, mask)
    assert torch.equal(masked_mse(student, 0 * teacher, mask, divide_by_teacher=True).total, plain.total)


@pytest.mark.parametrize("call", [masked_mse, cosine_loss, normalised_mse])
def test_unequal_widths_are_refused_with_both_widths(call: Callable[..., Mean]) -> None:
    with pytest.raises(UserError, match=r"4 wide and the teacher's 6.*projection"):
        call(torch.ones(2, 4), torch.ones(2, 6))


@pytest.mark.parametrize(("call", "values"), [(cosine_loss, (1.0, 1.0)), (normalised_mse, (1.0, 0.0))])
def test_zero_vectors_have_no_gradient(call: Callable[..., Mean], values: tuple[float, float]) -> None:
    student, teacher = torch.zeros(1, 3), torch.tensor([[3.0, 0, 4]])
    for target, expected in zip((teacher, torch.zeros(1, 3)), values, strict=True):
        assert call(student, target).value.item() == expected
        slope = gradient(call, student, target, None)
        assert torch.equal(slope, torch.zeros_like(slope))


def test_cosine_and_normalised_mse_do_not_depend_on_scale_and_have_their_ranges() -> None:
    student, teacher, mask = example()
    assert normalised_mse(student * 7, teacher * 0.1, mask).value.item() == pytest.approx(
        2 * cosine_loss(student, teacher, mask).value.item(), rel=1e-12
    )
    assert cosine_loss(student, -3 * student, mask).value.item() == pytest.approx(2, rel=1e-12)
    assert normalised_mse(student, -3 * student, mask).value.item() == pytest.approx(4, rel=1e-12)


def test_many_float32_numbers_are_added_up_without_loss() -> None:
    student, teacher = (torch.randn(4096, 768, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    linear = LinearMap(torch.eye(768))
    exact = (student.double() - teacher.double()).square().mean().item()
    assert masked_mse(student, teacher).value.item() == pytest.approx(exact, rel=2e-6)
    assert projected_mse(student, linear, teacher).value.item() == pytest.approx(exact, rel=2e-6)
    wide = cka_loss(student, teacher, form="feature").value.item()
    assert wide == pytest.approx(cka_loss(student.double(), teacher.double()).value.item(), rel=2e-6)
