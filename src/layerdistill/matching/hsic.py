"""The parts of CKA: features centred over all processes, the inner products of their kernels, and their gradient.

The gradient is written out, not left to autograd: it is all that is kept of a pair until its backward, and a side that
many pairs share (`Side`) is centred and multiplied by itself once. When the two sides are equal, value and gradient of
the loss are exactly 0: the two halves of the gradient come out of the same operations, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerdistill.matching.rows import as_factor, square_sum, upcast

Form = Literal["auto", "feature", "gram"]
"""`feature`: hidden x hidden matrices; `gram`: tokens x tokens; `auto`: whichever needs fewer multiply-adds."""

Reduce = Callable[[Tensor], Tensor]
"""A sum over processes, with gradient; the identity when there is one process."""


class Side:
    """The real rows `(rows, hidden)` of one representation, centred over all processes' rows; nothing has a gradient.

    `count` is the number of all processes' rows, `scale` the Frobenius norm of the centred ones (1 where they do not
    vary, which `flat` says), all 0-d. They and all sums are in the precision of `rows`, float32 at least; the centred
    rows are kept, and multiplied, in `factors` (default: the same), to which the mean is rounded too if `rows` are.
    `number` is that of this process's rows, after which `rows` may hold rows of zeros (`as_factor`).
    """

    def __init__(self, rows: Tensor, reduce: Reduce, factors: torch.dtype | None = None) -> None:
        wide = upcast(rows[:0]).dtype
        factors = factors or wide
        rows = rows if rows.dtype == factors else upcast(rows)
        self.reduce = reduce
        self.number = len(rows)
        self._second_moments: Tensor | None = None
        self._gram: Tensor | None = None
        with torch.no_grad():
            sums = reduce(torch.cat([rows.new_full((1,), self.number, dtype=wide), rows.sum(0, dtype=wide)]))
            self.count = sums[0]
            mean = sums[1:] / self.count.clamp(min=1)
            # Taken away twice: first what all rows share, before they are rounded, then what rounding left of it.
            self.rows = as_factor(rows, factors, minus=mean)
            centred = self.rows[: self.number]
            centred -= (reduce(centred.sum(0, dtype=wide)) / self.count.clamp(min=1)).to(factors)
            square = reduce(square_sum(centred))
            norm, raw = square.sqrt(), (square + self.count * mean.square().sum()).sqrt()
            self.flat = norm <= torch.finfo(wide).eps * raw
            self.scale = norm.masked_fill(self.flat, 1.0)

    def second_moments(self) -> Tensor:
        """Return X'X over all processes, `(hidden, hidden)`, of the rows divided by `scale`; computed once."""
        # Not functools.cached_property: until Python 3.12 all objects share its lock, and a sum may wait for others.
        if self._second_moments is None:
            self._second_moments = cross_moments(self, self)
        return self._second_moments

    def gram(self) -> Tensor:
        """Return X X', `(rows, rows)`, of the rows divided by `scale`; computed once."""
        if self._gram is None:
            self._gram = upcast(self.rows @ self.rows.T) / self.scale.square()
        return self._gram

    def diagonal(self) -> Tensor:
        """Return the diagonal of `gram`, `(rows,)`."""
        return upcast(self.rows).square().sum(1) / self.scale.square()


@dataclass(frozen=True)
class Similarity:
    """A CKA value with what makes it undefined: too few rows (`count`), or a side that does not vary (`flat_*`)."""

    value: Tensor
    count: Tensor
    flat_x: Tensor
    flat_y: Tensor


@dataclass(frozen=True)
class Products:
    """Inner products of the linear kernels K = X X', L = Y Y': `xy` = <K, L>, `xx` = <K, K>, `yy` = <L, L>."""

    xy: Tensor
    xx: Tensor
    yy: Tensor


def fewest_rows(debiased: bool) -> int:
    """Return how many rows CKA needs: 2, or 4 for the debiased estimator, whose formula divides by n (n - 3)."""
    return 4 if debiased else 2


def cheaper_form(rows: int, width_x: int, width_y: int) -> Form:
    """Return the form with fewer multiply-adds: n^2 (d_x + d_y) as `gram`, n (d_x^2 + d_y^2 + d_x d_y) as `feature`."""
    return "gram" if rows * (width_x + width_y) < width_x**2 + width_y**2 + width_x * width_y else "feature"


def cross_moments(x: Side, y: Side) -> Tensor:
    """Return Y'X over all processes, `(hidden_y, hidden_x)`, of the rows divided by their `scale`."""
    return x.reduce(upcast(y.rows.T @ x.rows)).div_(y.scale * x.scale)


def similarity(x: Tensor, y: Tensor, side_x: Side, side_y: Side, debiased: bool, form: Form) -> Similarity:
    """Return the linear CKA of the rows of `x` `(rows, d_x)` and `y` `(rows, d_y)`, whose sides these are.

    Differentiable in `x` and `y`. Where it is undefined the value is finite and means nothing. NaN and infinity go
    through.
    """
    if not torch.is_grad_enabled():
        x, y = x.detach(), y.detach()  # a gradient is computed at once where one may be asked for
    flat_x, flat_y = side_x.flat, side_y.flat
    cross = None if form == "gram" else cross_moments(side_x, side_y)
    products = _products(side_x, side_y, cross)
    if debiased:
        count = side_x.count.clamp(min=fewest_rows(True))
        corrected = Products(
            products.xy + _correction(side_y, side_x, count),
            products.xx + _correction(side_x, side_x, count),
            products.yy + _correction(side_y, side_y, count),
        )
        rounding = 16 * torch.finfo(x.dtype).eps
        flat_x = flat_x | (corrected.xx <= rounding * products.xx)
        flat_y = flat_y | (corrected.yy <= rounding * products.yy)
        products = corrected
    products = Products(
        products.xy,
        products.xx.masked_fill(flat_x, 1.0),
        products.yy.masked_fill(flat_y, 1.0),
    )
    # Equal to xy / sqrt(xx yy); at equality both factors are exactly 1.
    value = (products.xy / products.xx) * (products.xx / products.yy).sqrt()
    pull = _Pull(
        cross,
        towards=2 * (products.xx / products.yy).sqrt() / products.xx,
        back_x=2 * value / products.xx,
        back_y=2 * value / products.yy,
        debiased=debiased,
    )
    return Similarity(_WithGradient.apply(x, y, value, side_x, side_y, pull), side_x.count, flat_x, flat_y)


@dataclass(frozen=True)
class _Pull:
    """The gradient of a value V = xy / sqrt(xx yy): dV/dX = `towards` L X - `back_x` K X, and dV/dY likewise.

    `cross` is Y'X, or None in the `gram` form.
    """

    cross: Tensor | None
    towards: Tensor
    back_x: Tensor
    back_y: Tensor
    debiased: bool


class _WithGradient(torch.autograd.Function):
    """A value that was computed without a graph, with the gradient of both sides' rows.

    The gradient is computed at once, so that nothing but it is kept until the backward.

    d<K, L>/dX = 2 L X and d<K, K>/dX = 4 K X. Dividing by the norm and centring need no gradient of their own: the
    value does not depend on the norm, and with centred X and Y the columns of L X and K X add up to 0. Only the
    debiased form's corrections, which weigh rows, are centred again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, value: Tensor, side_x: Side, side_y: Side, pull: _Pull) -> Tensor:
        of_x = of_y = None
        if ctx.needs_input_grad[0]:
            of_x = _gradient(side_x, side_y, pull.cross, pull.towards, pull.back_x, pull.debiased)
        if ctx.needs_input_grad[1]:
            turned = None if pull.cross is None else pull.cross.T
            of_y = _gradient(side_y, side_x, turned, pull.towards, pull.back_y, pull.debiased)
        ctx.save_for_backward(of_x, of_y)
        ctx.reduce = side_x.reduce
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        upstream = ctx.reduce(upstream)
        of_x, of_y = (None if found is None else found * upstream for found in ctx.saved_tensors)
        return of_x, of_y, None, None, None, None


def _gradient(side: Side, other: Side, cross: Tensor | None, towards: Tensor, back: Tensor, debiased: bool) -> Tensor:
    """Return `towards` L X - `back` K X, `(rows, hidden)`, as a gradient of the rows before division by `scale`.

    X are the rows of `side` after it; `cross` is `(hidden_other, hidden_side)`.
    """
    dtype = side.rows.dtype
    if cross is None:
        gradient = (other.gram() * (towards / side.scale.square())).to(dtype) @ side.rows
        gradient -= (side.gram() * (back / side.scale.square())).to(dtype) @ side.rows
    else:
        gradient = other.rows @ (cross * (towards / (side.scale * other.scale))).to(dtype)
        gradient -= side.rows @ (side.second_moments() * (back / (side.scale * side.scale))).to(dtype)
    gradient = upcast(gradient[: side.number])
    if debiased:
        count = side.count.clamp(min=fewest_rows(True))
        weights = towards * _correction_slope(other, count) - back * _correction_slope(side, count)
        gradient += (weights / side.scale.square()).unsqueeze(1) * upcast(side.rows)
        gradient -= side.reduce(gradient.sum(0)) / count
    return gradient


def _products(x: Side, y: Side, cross: Tensor | None) -> Products:
    if cross is None:
        return Products((y.gram() * x.gram()).sum(), (x.gram() * x.gram()).sum(), (y.gram() * y.gram()).sum())
    return Products(*(square_sum(product) for product in (cross, x.second_moments(), y.second_moments())))


def _correction(x: Side, y: Side, count: Tensor) -> Tensor:
    """Return what to add to <K, L> to have n (n - 3) HSIC_1 (Song et al. 2012) of centred features.

    HSIC_1 replaces the diagonals by 0. With centred columns the row sums of a kernel without its diagonal are minus
    that diagonal, so that the published formula becomes, with k_i = |x_i|^2 and l_i = |y_i|^2,
    <K, L> - n / (n - 2) sum(k_i l_i) + sum(k_i) sum(l_i) / ((n - 1) (n - 2)): no n x n matrix, and sums over rows only.
    """
    k, l_ = x.diagonal(), y.diagonal()
    both, only_k, only_l = x.reduce(torch.stack([(k * l_).sum(), k.sum(), l_.sum()])).unbind()
    return only_k * only_l / ((count - 1) * (count - 2)) - count / (count - 2) * both


def _correction_slope(other: Side, count: Tensor) -> Tensor:
    """Return the derivative of the correction with respect to the other side's k_i, `(rows,)`."""
    total = other.reduce(other.diagonal().sum())
    return total / ((count - 1) * (count - 2)) - count / (count - 2) * other.diagonal()
