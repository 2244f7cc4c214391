"""The parts of CKA: features centred over all processes, and the inner products of their kernels.

Written so that, when the two sides are equal, value and gradient of the loss are exactly 0: the student's inner product
with itself is differentiated through one of its two (equal) factors only. That gives half of its gradient by the same
operations, in the same order, as the gradient of the product with the teacher, and the two cancel to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["auto", "feature", "gram"]
"""`feature`: hidden x hidden matrices; `gram`: tokens x tokens; `auto`: whichever needs fewer multiply-adds."""

Reduce = Callable[[Tensor], Tensor]
"""A sum over processes, with gradient; the identity when there is one process."""


@dataclass(frozen=True)
class Similarity:
    """A CKA value with what makes it undefined: too few rows (`count`), or a side that does not vary (`flat_*`)."""

    value: Tensor
    count: Tensor
    flat_x: Tensor
    flat_y: Tensor


@dataclass(frozen=True)
class Products:
    """Inner products of the linear kernels K = X X', L = Y Y': `xy` = <K, L>, `xx` = <K, K>, `yy` = <L, L>.

    `xx` and `yy` carry half of their gradient (see the module's docstring), which `similarity` makes up for.
    """

    xy: Tensor
    xx: Tensor
    yy: Tensor


def fewest_rows(debiased: bool) -> int:
    """Return how many rows CKA needs: 2, or 4 for the debiased estimator, whose formula divides by n (n - 3)."""
    return 4 if debiased else 2


def cheaper_form(rows: int, width_x: int, width_y: int) -> Form:
    """Return the form with fewer multiply-adds: n^2 (d_x + d_y) as `gram`, n (d_x^2 + d_y^2 + d_x d_y) as `feature`."""
    return "gram" if rows * (width_x + width_y) < width_x**2 + width_y**2 + width_x * width_y else "feature"


def similarity(x: Tensor, y: Tensor, debiased: bool, form: Form, reduce: Reduce) -> Similarity:
    """Return the linear CKA of the rows of `x` `(rows, d_x)` and `y` `(rows, d_y)`, summed over processes by `reduce`.

    Where it is undefined the value is finite and means nothing. NaN and infinity go through.
    """
    x, y, count, flat_x, flat_y = _centred_and_scaled(x, y, reduce)
    products = _gram_products(x, y) if form == "gram" else _feature_products(x, y, reduce)
    if debiased:
        corrections = _diagonal_corrections(x, y, count.clamp(min=fewest_rows(True)), reduce)
        corrected = Products(products.xy + corrections.xy, products.xx + corrections.xx, products.yy + corrections.yy)
        rounding = 16 * torch.finfo(x.dtype).eps
        flat_x = flat_x | (corrected.xx <= rounding * products.xx)
        flat_y = flat_y | (corrected.yy <= rounding * products.yy)
        products = corrected
    xx = torch.where(flat_x, torch.ones_like(products.xx), products.xx)
    yy = torch.where(flat_y, torch.ones_like(products.yy), products.yy)
    # Equal to xy / sqrt(xx yy). xx and yy, with half of their gradient, stand once where their roots would: that is the
    # whole gradient. At equality each of the three factors is exactly 1.
    value = (products.xy / xx) * (yy.detach() / yy) * (xx / yy).detach().sqrt()
    return Similarity(value, count, flat_x, flat_y)


def _centred_and_scaled(x: Tensor, y: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Centre the columns, divide by the Frobenius norms, and say which side does not vary.

    The mean is taken twice: the first, without gradient, removes what is common to all rows; the second removes what
    rounding left of it, and carries the gradient. CKA does not depend on the scale, so the norms carry none.
    """
    widths = [x.shape[1], y.shape[1]]
    with torch.no_grad():
        first = reduce(torch.cat([x.new_full((1,), x.shape[0]), x.sum(0), y.sum(0)]))
        count, first_x, first_y = first.split([1, *widths])
        count = count.squeeze(0)
        rows = count.clamp(min=1)
        raw = torch.stack([x.square().sum(), y.square().sum()])
    x, y = x - first_x / rows, y - first_y / rows
    squares = torch.stack([x.detach().square().sum(), y.detach().square().sum()])
    second = reduce(torch.cat([x.sum(0), y.sum(0), squares, raw]))
    rest_x, rest_y, squares, raw = second.split([*widths, 2, 2])
    # A side without a graph must not get one from having travelled in the same tensor as the other side's sums.
    rest_x = (rest_x if x.requires_grad else rest_x.detach()) / rows
    rest_y = (rest_y if y.requires_grad else rest_y.detach()) / rows
    with torch.no_grad():
        left = torch.stack([rest_x.square().sum(), rest_y.square().sum()])
        norms = (squares - rows * left).clamp(min=0).sqrt()
        flat = norms <= torch.finfo(x.dtype).eps * raw.sqrt()
        scales = torch.where(flat, torch.ones_like(norms), norms)
    return (x - rest_x) / scales[0], (y - rest_y) / scales[1], count, flat[0], flat[1]


def _feature_products(x: Tensor, y: Tensor, reduce: Reduce) -> Products:
    return Products(
        xy=reduce(y.T @ x).square().sum(),
        xx=reduce(x.detach().T @ x).square().sum(),
        yy=reduce(y.detach().T @ y).square().sum(),
    )


def _gram_products(x: Tensor, y: Tensor) -> Products:
    gram_x, gram_y = x @ x.T, y @ y.T
    return Products(
        xy=(gram_y * gram_x).sum(), xx=(gram_x.detach() * gram_x).sum(), yy=(gram_y.detach() * gram_y).sum()
    )


def _diagonal_corrections(x: Tensor, y: Tensor, count: Tensor, reduce: Reduce) -> Products:
    """Return what to add to each product to have n (n - 3) HSIC_1 (Song et al. 2012) of centred features.

    HSIC_1 replaces the diagonals by 0. With centred columns the row sums of a kernel without its diagonal are minus
    that diagonal, so that the published formula becomes, with k_i = |x_i|^2 and l_i = |y_i|^2,
    <K, L> - n / (n - 2) sum(k_i l_i) + sum(k_i) sum(l_i) / ((n - 1) (n - 2)): no n x n matrix, and sums over rows only.
    """
    k, l_ = x.square().sum(1), y.square().sum(1)

    def correction(first: Tensor, second: Tensor) -> Tensor:
        both, only_first, only_second = reduce(
            torch.stack([(first * second).sum(), first.sum(), second.sum()])
        ).unbind()
        return only_first * only_second / ((count - 1) * (count - 2)) - count / (count - 2) * both

    return Products(xy=correction(l_, k), xx=correction(k.detach(), k), yy=correction(l_.detach(), l_))
