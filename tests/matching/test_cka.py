"""Linear CKA: its two forms, its invariances, its bias, its degenerate inputs, and sums over shards."""

from __future__ import annotations

import functools
import math
import operator
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.matching import (
    CkaStatistics,
    cka_from_statistics,
    cka_loss,
    cka_statistics,
    cka_target,
    hsic,
    linear_cka,
)
from layerdistill.matching.hsic import cheaper_form
from layerdistill.matching.rows import as_factor

from . import references

both_estimators = pytest.mark.parametrize("debiased", [False, True])


def features(rows: int, width: int, seed: int, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.2, 3, width, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) * scales + offset


def related(rows: int, width_x: int, width_y: int) -> tuple[Tensor, Tensor]:
    """Two representations of the same tokens that share part of their variance, in different widths."""
    x = features(rows, width_x, seed=1, offset=2.0)
    mixing = features(width_x, width_y, seed=2)
    return x, x @ mixing / width_x**0.5 + features(rows, width_y, seed=3, offset=-5.0)


@both_estimators
@pytest.mark.parametrize("rows", [5, 40, 200])
def test_both_forms_are_the_equation(rows: int, debiased: bool) -> None:
    x, y = related(rows, 24, 16)
    reference = references.debiased_cka if debiased else references.linear_cka
    expected = reference(x.numpy(), y.numpy())
    for form in ("feature", "gram", "auto"):
        assert linear_cka(x, y, debiased=debiased, form=form).item() == pytest.approx(expected, abs=1e-10)


@both_estimators
def test_both_forms_have_the_same_gradient_in_both_arguments(debiased: bool) -> None:
    slopes = []
    for form in ("feature", "gram"):
        x, y = (side.requires_grad_() for side in related(30, 12, 8))
        slopes.append(torch.autograd.grad(linear_cka(x, y, debiased=debiased, form=form), (x, y)))
    for feature, gram in zip(*slopes, strict=True):
        assert (feature - gram).abs().max() < 1e-12
        assert feature.abs().max() > 1e-3


@both_estimators
@pytest.mark.parametrize("form", ["feature", "gram"])
def test_gradcheck_in_both_arguments(form: str, debiased: bool) -> None:
    x, y = (side.requires_grad_() for side in related(7, 4, 3))
    assert torch.autograd.gradcheck(lambda a, b: linear_cka(a, b, debiased=debiased, form=form), (x, y))


def test_auto_takes_the_form_with_fewer_multiply_adds() -> None:
    for rows, width_x, width_y, expected in (
        (895, 384, 768, "gram"),
        (897, 384, 768, "feature"),
        (1535, 1024, 1024, "gram"),
        (1537, 1024, 1024, "feature"),
        (256, 384, 768, "gram"),
        (4096, 384, 768, "feature"),
    ):
        assert cheaper_form(rows, width_x, width_y) == expected


@both_estimators
def test_what_it_is_invariant_to(debiased: bool) -> None:
    x, y = related(40, 10, 14)
    rotation = torch.linalg.qr(features(10, 10, seed=4)).Q
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    plain = linear_cka(x, y, debiased=debiased).item()
    for changed_x, changed_y in (
        (x @ rotation, y),
        (x * 1e-3, y * 1e4),
        (x + 100 * features(1, 10, seed=5), y),
        (x[order], y[order]),
    ):
        assert linear_cka(changed_x, changed_y, debiased=debiased).item() == pytest.approx(plain, rel=1e-9)
    assert linear_cka(y, x, debiased=debiased).item() == pytest.approx(plain, rel=1e-12)
    assert linear_cka(x, x @ rotation, debiased=debiased).item() == pytest.approx(1, rel=1e-12)


@both_estimators
def test_what_it_is_not_invariant_to(debiased: bool) -> None:
    x, y = related(40, 10, 14)
    plain = linear_cka(x, y, debiased=debiased).item()
    general = torch.diag(torch.linspace(1, 6, 10, dtype=torch.float64))
    assert abs(linear_cka(x @ general, y, debiased=debiased).item() - plain) > 1e-2
    assert abs(linear_cka(x, y.roll(1, 0), debiased=debiased).item() - plain) > 1e-2


def test_bias_of_independent_noise_at_32_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [(torch.randn(32, 384, generator=generator), torch.randn(32, 768, generator=generator)) for _ in range(20)]
    biased = np.mean([linear_cka(x, y).item() for x, y in draws])
    debiased = np.mean([linear_cka(x, y, debiased=True).item() for x, y in draws])
    assert biased == pytest.approx(0.94, abs=0.01)
    assert debiased == pytest.approx(0.0, abs=0.02)


def test_parity_with_the_released_code() -> None:
    x, y = related(60, 12, 20)
    mask = torch.ones(3, 20)
    loss = cka_loss(x.reshape(3, 20, 12), y.reshape(3, 20, 20), mask, sqrt=True)
    assert loss.value.item() == pytest.approx(references.released_cka_loss(x.numpy(), y.numpy()), rel=1e-8)
    squared = cka_loss(x, y)
    assert (1 - loss.value.item()) ** 2 == pytest.approx(1 - squared.value.item(), rel=1e-12)


def test_root_of_no_similarity_has_a_finite_gradient() -> None:
    x = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]], requires_grad=True)
    y = torch.tensor([[1.0], [1], [-1], [-1]])
    loss = cka_loss(x, y, sqrt=True, form="feature").value
    loss.backward()
    assert loss.item() == 1
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("rows", "form"), [(50, "gram"), (700, "feature")])
@pytest.mark.parametrize(("debiased", "sqrt"), [(False, False), (False, True), (True, False)])
def test_float32_is_close_to_float64_far_from_the_origin(rows: int, form: str, debiased: bool, sqrt: bool) -> None:
    x, y = related(rows, 48, 32)
    x, y = (x * 30 + 500).float(), (y - 300).float()
    exact = cka_loss(x.double(), y.double(), debiased=debiased, sqrt=sqrt, form=form).value.item()
    assert cka_loss(x, y, debiased=debiased, sqrt=sqrt, form=form).value.item() == pytest.approx(exact, abs=2e-6)


def test_equal_wide_sides_are_exactly_aligned_in_float32() -> None:
    x = features(300, 96, seed=0, offset=3.0).float()
    for form in ("feature", "gram"):
        student = x.clone().requires_grad_()
        loss = cka_loss(student, x, form=form).value
        loss.backward()
        assert student.grad is not None
        assert loss.item() == pytest.approx(0, abs=1e-7)
        assert student.grad.abs().max() < 1e-9


@pytest.mark.parametrize("form", ["feature", "gram"])
@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_kept_until_the_backward_but_the_gradient(
    form: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []

    def noted(*args: Any, **options: Any) -> Tensor:
        factor = as_factor(*args, **options)
        made.append(weakref.ref(factor))
        return factor

    monkeypatch.setattr(hsic, "as_factor", noted)
    x, y = (side.float() for side in related(300, 12, 20))
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.shape), lambda _: None),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        loss = cka_loss(x.requires_grad_(), cka_target(y), form=form)
    assert [shape for shape in kept if shape] == [(300, 12)]
    assert loss.total.requires_grad and len(made) == 2
    assert all(factor() is None for factor in made), "the centred rows of both sides are gone"


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hsic, "_gradient", None)
    x, y = (side.requires_grad_() for side in related(30, 12, 8))
    with torch.no_grad():
        assert cka_loss(x, y).count.item() == 1


@both_estimators
@pytest.mark.parametrize("form", ["feature", "gram"])
def test_a_shared_target_gives_what_the_teacher_itself_gives(form: str, debiased: bool) -> None:
    x, y = (side.float() for side in related(30, 12, 8))
    target = cka_target(y)
    for scale in (1.0, 3.0):
        slopes, values = [], []
        for teacher in (y, target):
            student = (x * scale).sin().requires_grad_()
            loss = cka_loss(student, teacher, debiased=debiased, form=form).value
            slopes.append(torch.autograd.grad(loss, student)[0])
            values.append(loss.item())
        assert values[0] == values[1]
        assert torch.equal(*slopes)
    with pytest.raises(UserError, match="29 real tokens and the cka_target 30"):
        cka_loss(x[:29], target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["feature", "gram"])
@pytest.mark.parametrize(
    ("debiased", "rows", "constant"),
    [(False, 0, ""), (False, 1, ""), (True, 3, ""), *((flag, 9, side) for flag in (False, True) for side in "xy")],
)
def test_undefined_is_zero_weight_in_the_loss_and_an_error_elsewhere(
    debiased: bool, rows: int, constant: str, form: str, dtype: torch.dtype
) -> None:
    x, y = (side.to(dtype) for side in related(rows, 6, 5))
    if constant == "x":
        x = features(1, 6, seed=8, offset=1e3).to(dtype).repeat(rows, 1)
    if constant == "y":
        y = features(1, 5, seed=8, offset=1e3).to(dtype).repeat(rows, 1)
    student = x.clone().requires_grad_()
    mean = cka_loss(student, y, debiased=debiased, form=form)
    mean.value.backward()
    assert student.grad is not None
    assert (mean.total.item(), mean.count.item()) == (0, 0)
    assert torch.equal(student.grad, torch.zeros_like(x))
    said = f"{constant} does not vary over its 9" if constant else f"{rows} real tokens, but needs at least"
    with pytest.raises(UserError, match=said):
        linear_cka(x, y, debiased=debiased, form=form)


def test_rows_that_differ_by_the_last_bit_do_not_vary() -> None:
    generator = torch.Generator().manual_seed(0)
    x = features(1, 6, seed=8, offset=100).float().repeat(50, 1)
    nudged = torch.where(torch.rand(50, 6, generator=generator) < 0.5, x.nextafter(2 * x), x)
    y = features(50, 5, seed=0).float()
    assert (nudged != x).any()
    assert cka_loss(nudged, y).count.item() == 0
    assert cka_loss(nudged * (1 + 1e-4 * y[:, :1]), y).count.item() == 1


def test_debiased_is_undefined_for_one_outlier_among_equal_tokens() -> None:
    x = torch.zeros(4, 3, dtype=torch.float64)
    x[0] = 1
    y = features(4, 3, seed=0)
    assert cka_loss(x, y, debiased=True).count.item() == 0
    assert cka_loss(x, y).count.item() == 1


@pytest.mark.parametrize("rows", [1, 6])
def test_nan_goes_through_even_where_cka_is_undefined(rows: int) -> None:
    x, y = torch.ones(rows, 3), torch.ones(rows, 2)
    y[0, 0] = math.nan
    mean = cka_loss(x, y)
    assert mean.count.item() == 1
    assert mean.value.isnan()


def test_linear_cka_of_nan_is_nan() -> None:
    x, y = related(8, 3, 3)
    x[2, 1] = math.nan
    assert linear_cka(x, y).isnan()


def test_choices_that_cannot_be_are_refused() -> None:
    x, y = related(8, 3, 4)
    with pytest.raises(UserError, match="negative and has no root"):
        cka_loss(x, y, sqrt=True, debiased=True)
    with pytest.raises(UserError, match=r"form is 'gramm'.*Did you mean 'gram'"):
        linear_cka(x, y, form="gramm")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="form='gram' with all_reduce"):
        cka_loss(x, y, form="gram", all_reduce=torch.clone)


SHARDS = (slice(0, 11), slice(11, 12), slice(12, 50), slice(50, 90))


@pytest.mark.parametrize("shifted", [False, True])
def test_statistics_of_shards_add_up_to_the_whole(shifted: bool) -> None:
    x, y = related(90, 7, 5)
    shifts = (x[:11].mean(0), y[:11].mean(0)) if shifted else (None, None)
    parts = [cka_statistics(x[shard], y[shard], None, *shifts) for shard in SHARDS]
    added = functools.reduce(operator.add, parts)
    assert added.count.item() == 90
    expected = references.linear_cka(x.numpy(), y.numpy())
    assert cka_from_statistics(added).item() == pytest.approx(expected, rel=1e-12)
    mean_of_parts = np.mean([linear_cka(x[shard], y[shard]).item() for shard in (SHARDS[0], SHARDS[2], SHARDS[3])])
    assert abs(mean_of_parts - expected) > 1e-2


def test_statistics_leave_padding_out() -> None:
    x, y = related(12, 4, 3)
    x, y = x.reshape(3, 4, 4), y.reshape(3, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    x[mask == 0] = math.nan
    expected = linear_cka(x, y, mask).item()
    assert cka_from_statistics(cka_statistics(x, y, mask)).item() == pytest.approx(expected, rel=1e-12)


def test_a_shift_saves_the_digits_of_float32_sums() -> None:
    x, y = related(90, 7, 5)
    expected = references.linear_cka(x.numpy(), y.numpy())
    x, y = (x + 600).float(), y.float()
    with_shift = cka_from_statistics(cka_statistics(x, y, shift_x=x[0], shift_y=y[0])).item()
    assert with_shift == pytest.approx(expected, abs=3e-5)
    assert abs(cka_from_statistics(cka_statistics(x, y)).item() - expected) > 2e-4
    with pytest.raises(UserError, match="Give cka_statistics a shift_x near the column means"):
        cka_from_statistics(cka_statistics(10 * x + 30_000, y))


def test_statistics_that_do_not_belong_together_or_say_nothing_are_refused() -> None:
    x, y = related(9, 3, 4)
    plain, shifted = cka_statistics(x, y), cka_statistics(x, y, shift_x=x[0])
    with pytest.raises(UserError, match="different shifts"):
        plain + shifted
    with pytest.raises(UserError, match="different shifts"):
        shifted + cka_statistics(x, y, shift_x=x[1])
    with pytest.raises(UserError, match="1 real tokens, but needs at least 2"):
        cka_from_statistics(cka_statistics(x[:1], y[:1]))
    with pytest.raises(UserError, match="y does not vary over its 9"):
        cka_from_statistics(cka_statistics(x, torch.full_like(y, 7.3)))
    assert isinstance(plain + plain, CkaStatistics)
