"""CKA from sums over shards: the same as of all tokens at once, in both forms."""

from __future__ import annotations

import math

import pytest
import torch
from matching import references
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.matching import linear_cka
from layerdistill.matching.cka_sums import cka_of_sums, cross_sums, layer_sums


def pair(tokens: int = 40) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(tokens, 5, generator=draw, dtype=torch.float64) + 3
    y = torch.randn(tokens, 8, generator=draw, dtype=torch.float64) - 1
    y[:, :5] += x
    return x, y


@pytest.mark.parametrize("debiased", [False, True])
def test_sums_of_shards_give_cka_of_all_tokens(debiased: bool) -> None:
    x, y = pair()
    shift_x, shift_y = x[:10].mean(0), torch.zeros(8, dtype=torch.float64)
    shards = [(x[a:b], y[a:b]) for a, b in ((0, 3), (3, 21), (21, 40))]
    sums_x, *rest_x = [layer_sums(rows, shift_x) for rows, _ in shards]
    sums_y, *rest_y = [layer_sums(rows, shift_y) for _, rows in shards]
    cross, *rest = [cross_sums(a, b, shift_x, shift_y) for a, b in shards]
    for a, b, c in zip(rest_x, rest_y, rest, strict=True):
        sums_x, sums_y, cross = sums_x + a, sums_y + b, cross + c
    found = cka_of_sums(sums_x, sums_y, cross, debiased)
    reference = references.debiased_cka if debiased else references.linear_cka
    assert found == pytest.approx(reference(x.numpy(), y.numpy()), rel=1e-10)
    assert found == pytest.approx(linear_cka(x, y, debiased=debiased).item(), rel=1e-10)


def test_far_from_zero_in_float32() -> None:
    x, y = (side.float() + 300 for side in pair(4000))
    shifts = x[:50].mean(0), y[:50].mean(0)
    found = cka_of_sums(layer_sums(x, shifts[0]), layer_sums(y, shifts[1]), cross_sums(x, y, *shifts), debiased=True)
    assert found == pytest.approx(linear_cka(x.double(), y.double(), debiased=True).item(), abs=1e-5)


def test_a_layer_that_does_not_vary_has_no_cka() -> None:
    x, y = (side.float() for side in pair())
    flat = torch.full_like(x, 0.1) + torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    shift = flat[:7].mean(0)
    found = cka_of_sums(layer_sums(flat, shift), layer_sums(y, y[0]), cross_sums(flat, y, shift, y[0]))
    assert math.isnan(found)


def test_what_does_not_fit_is_refused() -> None:
    x, y = pair()
    with pytest.raises(UserError, match="different shifts"):
        _ = layer_sums(x, x[0]) + layer_sums(x, x[1])
    with pytest.raises(UserError, match="at least 4"):
        cka_of_sums(layer_sums(x[:3], x[0]), layer_sums(y[:3], y[0]), cross_sums(x[:3], y[:3], x[0], y[0]), True)
    with pytest.raises(UserError, match="shape"):
        cross_sums(x[:3], y[:4], x[0], y[0])
