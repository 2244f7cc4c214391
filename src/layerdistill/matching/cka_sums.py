"""Sums over tokens from which CKA of many pairs of layers follows exactly, the debiased form too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.matching.hsic import fewest_rows
from layerdistill.matching.rows import in_full_precision, same_rows, upcast


@dataclass(frozen=True)
class LayerSums:
    """Sums over the tokens `x` of one layer, each less `shift` `(hidden,)`; `a + b` is that of both sets of tokens.

    `count` is 0-d, `total` `(hidden,)` the sum of x, `product` `(hidden, hidden)` of x x', `cubic` `(hidden,)` of
    |x|^2 x and `fourth` 0-d of |x|^4; all float64.
    """

    shift: Tensor
    count: Tensor
    total: Tensor
    product: Tensor
    cubic: Tensor
    fourth: Tensor

    def __add__(self, other: LayerSums) -> LayerSums:
        """Add the sums of two shards; raises UserError when different shifts were subtracted from them."""
        if not torch.equal(self.shift, other.shift):
            raise UserError("two LayerSums with different shifts cannot be added: give every shard the same shift.")
        return LayerSums(
            self.shift,
            self.count + other.count,
            self.total + other.total,
            self.product + other.product,
            self.cubic + other.cubic,
            self.fourth + other.fourth,
        )


@dataclass(frozen=True)
class CrossSums:
    """Sums over the tokens of two layers, less their shifts; `a + b` is that of both sets of tokens; all float64.

    `product` `(hidden_x, hidden_y)` of x y', `first` `(hidden_x,)` of |y|^2 x, `second` `(hidden_y,)` of |x|^2 y, and
    `squares` 0-d of |x|^2 |y|^2.
    """

    product: Tensor
    first: Tensor
    second: Tensor
    squares: Tensor

    def __add__(self, other: CrossSums) -> CrossSums:
        return CrossSums(
            self.product + other.product,
            self.first + other.first,
            self.second + other.second,
            self.squares + other.squares,
        )


@in_full_precision
def layer_sums(x: Tensor, shift: Tensor) -> LayerSums:
    """Return the sums of `x` `(tokens, hidden)`, products in its precision (float32 at least).

    CKA does not depend on `shift` `(hidden,)`, but its precision does: give all shards one guess of the column means.
    """
    rows, squares = _shifted(x, shift)
    return LayerSums(
        shift=shift,
        count=torch.tensor(rows.shape[0], dtype=torch.float64, device=rows.device),
        total=rows.double().sum(0),
        product=(rows.T @ rows).double(),
        cubic=(squares @ rows).double(),
        fourth=squares.double().square().sum(),
    )


@in_full_precision
def cross_sums(x: Tensor, y: Tensor, shift_x: Tensor, shift_y: Tensor) -> CrossSums:
    """Return the sums of `x` `(tokens, hidden_x)` and `y` `(tokens, hidden_y)`; raises UserError for unequal counts."""
    same_rows(x, y)
    rows_x, squares_x = _shifted(x, shift_x)
    rows_y, squares_y = _shifted(y, shift_y)
    return CrossSums(
        product=(rows_x.T @ rows_y).double(),
        first=(squares_y @ rows_x).double(),
        second=(squares_x @ rows_y).double(),
        squares=(squares_x.double() * squares_y.double()).sum(),
    )


def cka_of_sums(x: LayerSums, y: LayerSums, cross: CrossSums, debiased: bool = False) -> float:
    """Return what `linear_cka` gives for all tokens that went into the sums; NaN where a side does not vary.

    The debiased form needs sum(k_i l_i) with k_i = |x_i - m|^2, which the sums hold once it is multiplied out (see
    `hsic` for the formula). Raises UserError for fewer than 2 tokens (4 if debiased).
    """
    if float(x.count) < fewest_rows(debiased):
        raise UserError(f"CKA was asked of {int(x.count)} real tokens, but needs at least {fewest_rows(debiased)}.")
    mine = CrossSums(x.product, x.cubic, x.cubic, x.fourth), CrossSums(y.product, y.cubic, y.cubic, y.fourth)
    xy, xx, yy = (_inner(*sides, debiased) for sides in ((x, y, cross), (x, x, mine[0]), (y, y, mine[1])))
    if any(_is_flat(side) or float(inner) <= 0 for side, inner in ((x, xx), (y, yy))):
        return float("nan")
    return float(xy / (xx * yy).sqrt())


def _shifted(values: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    rows = upcast(values)
    rows = rows - shift.to(rows)
    return rows, rows.square().sum(-1)


def _is_flat(side: LayerSums) -> bool:
    """Return whether a layer varies no more than float32 rounds."""
    rounding = 16 * torch.finfo(torch.float32).eps
    size = side.product.trace() + side.count * side.shift.double().square().sum()
    return bool(_spread(side) <= rounding * side.product.trace()) or bool(_spread(side) <= rounding**2 * size)


def _spread(side: LayerSums) -> Tensor:
    """Return the sum over tokens of the squared distance to their mean."""
    return side.product.trace() - side.total.square().sum() / side.count


def _inner(x: LayerSums, y: LayerSums, cross: CrossSums, debiased: bool) -> Tensor:
    """Return <K, L> of the centred kernels, and n (n - 3) HSIC_1 if debiased."""
    n, mean_x, mean_y = x.count, x.total / x.count, y.total / y.count
    found = (cross.product - torch.outer(x.total, mean_y)).square().sum()
    if not debiased:
        return found
    p, q = mean_x.square().sum(), mean_y.square().sum()
    diagonals = (
        cross.squares
        - 2 * (cross.second @ mean_y + cross.first @ mean_x)
        + q * x.product.trace()
        + p * y.product.trace()
        + 4 * (mean_x @ cross.product @ mean_y)
        - 3 * n * p * q
    )
    return found - n / (n - 2) * diagonals + _spread(x) * _spread(y) / ((n - 1) * (n - 2))
