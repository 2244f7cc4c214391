"""Linear centred kernel alignment (CKA): similarity of two representations whose widths may differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerdistill.core.errors import UserError, one_of
from layerdistill.core.types import Mean
from layerdistill.matching.hsic import Form, Reduce, Side, Similarity, cheaper_form, fewest_rows, similarity
from layerdistill.matching.rows import (
    factor_dtype,
    full_precision,
    in_full_precision,
    in_one_dtype,
    real_rows,
    real_rows_as_they_are,
    same_rows,
    upcast,
)


@in_full_precision
def linear_cka(x: Tensor, y: Tensor, mask: Tensor | None = None, debiased: bool = False, form: Form = "auto") -> Tensor:
    """Linear CKA of two representations of the same real tokens, a 0-d tensor.

    `x` is `(batch, seq, hidden_x)` with `mask` `(batch, seq)`, or `(tokens, hidden_x)`; `y` likewise, in its own width.
    `<K, L> / (|K| |L|)` for the kernels K = X X', L = Y Y' of the column-centred rows (Kornblith et al. 2019), from 0
    to 1. It grows with hidden/tokens, for noise too: compare only values of equal token counts. `debiased` puts the
    unbiased HSIC_1 (Song et al. 2012) in all three places (Nguyen et al. 2021); it is about 0 for independent
    representations and may be negative.

    `form` chooses between two equal computations: `feature` (hidden x hidden), `gram` (tokens x tokens), or `auto`, the
    one with fewer multiply-adds. Differentiable in both arguments, once (not twice). NaN or infinity in a real token
    gives NaN.

    Raises UserError for fewer than 2 real tokens (4 if debiased), and where a side does not vary.
    """
    rows_x, rows_y = _paired(x, y, mask)
    needed = fewest_rows(debiased)
    if rows_x.shape[0] < needed:
        raise UserError(
            f"CKA was asked of {rows_x.shape[0]} real tokens, but needs at least {needed}"
            f"{' (debiased)' if debiased else ''}: use a larger batch, or check the mask (1 on real tokens)."
        )
    sides = Side(rows_x, _alone), Side(rows_y, _alone)
    found = similarity(rows_x, rows_y, *sides, debiased, _resolve(form, rows_x, rows_y))
    for name, flat in (("x", found.flat_x), ("y", found.flat_y)):
        if bool(flat):
            raise UserError(
                f"CKA is not defined: {name} does not vary over its {rows_x.shape[0]} real tokens. Use tokens that "
                "differ, or leave this layer out (embeddings of one repeated token, for instance, are constant)."
            )
    return found.value


def cka_target(
    teacher: Tensor, mask: Tensor | None = None, debiased: bool = False, *, all_reduce: Reduce | None = None
) -> Side:
    """Return what `cka_loss` takes in the place of a teacher that several pairs share: centred and multiplied once.

    Shapes as in `linear_cka`; `debiased` and `all_reduce` as in `cka_loss`, and the same for both.
    """
    factors = None if debiased else factor_dtype(teacher)
    with full_precision(teacher):
        return Side(real_rows_as_they_are(teacher.detach(), mask), all_reduce or _alone, factors)


def cka_loss(
    student: Tensor,
    teacher: Tensor | Side,
    mask: Tensor | None = None,
    sqrt: bool = False,
    debiased: bool = False,
    *,
    form: Form = "auto",
    all_reduce: Reduce | None = None,
) -> Mean:
    """`1 - CKA` over the real tokens of this batch, or `1 - sqrt(CKA)`; shapes as in `linear_cka`, widths may differ.

    The unit is the batch: the count is 1, because the mean of micro-batches' CKAs is not the CKA of their union. The
    count is 0, with a loss and gradient of 0, for fewer than 2 real tokens (4 if debiased) or a side that does not
    vary; NaN in a real token gives NaN. No gradient reaches the teacher, which may also be a `cka_target` of the same
    real tokens (the loss is then computed in its precision).

    `sqrt` is the form in the code of Dasgupta & Cohn (ICLR 2025), `1 - |S'T| / sqrt(|S'S| |T'T|)`; it has half the
    gradient near 0 and a larger one beyond CKA = 1/4. Deviations: no 1e-8 is added to the norms (it would make the loss
    depend on the features' scale), and it is computed in the inputs' precision (float32 at least), not in float64;
    under autocast to bfloat16 the centred rows are rounded to it before they are multiplied, as a model's own matrix
    products are (not with `debiased`, which takes differences of what they add up to). Sums are not, of bfloat16 rows
    the mean is.

    With `all_reduce` the loss is that of all processes' tokens together. It must return the sum of a tensor over
    processes, and its backward the sum of the gradients, as `torch.distributed.nn.functional.all_reduce` does. Each
    process then holds the same value, and world_size times the gradient of it for its own tokens: what
    DistributedDataParallel, which averages, needs. Every process must take part, also one without real tokens.

    Raises UserError for `sqrt` with `debiased` (it can be negative), and for `form="gram"` with `all_reduce` (the n x n
    kernels would need every process's tokens).
    """
    if sqrt and debiased:
        raise UserError(
            "cka_loss was given sqrt=True and debiased=True, but debiased CKA can be negative and has no root: "
            "leave out one of them."
        )
    if all_reduce is not None and form == "gram":
        raise UserError(
            "cka_loss was given form='gram' with all_reduce, but the tokens x tokens kernels would need the tokens of "
            "all processes: use form='feature' or 'auto', whose hidden x hidden matrices add up over processes."
        )
    factors = None if debiased else factor_dtype(student)
    with full_precision(student):
        found = _found(student, teacher, mask, debiased, form, all_reduce, factors)
        undefined = _undefined(found, fewest_rows(debiased))
        loss = 1 - (_safe_root(found.value) if sqrt else found.value)
        return Mean(loss.masked_fill(undefined, 0.0), (~undefined).to(loss.dtype))


def _found(
    student: Tensor,
    teacher: Tensor | Side,
    mask: Tensor | None,
    debiased: bool,
    form: Form,
    all_reduce: Reduce | None,
    factors: torch.dtype | None,
) -> Similarity:
    reduce = all_reduce or _alone
    if isinstance(teacher, Tensor):
        s, t = _paired(student, teacher.detach(), mask)
        target = Side(t, reduce, factors)
    else:
        s, target = real_rows_as_they_are(student, mask), teacher
        _same_number(s, target)
    chosen = _resolve("feature" if all_reduce is not None and form == "auto" else form, s, target.rows)
    return similarity(upcast(s), target.rows, Side(s.detach(), reduce, target.rows.dtype), target, debiased, chosen)


@dataclass(frozen=True)
class CkaStatistics:
    """Sums over tokens from which the (biased) CKA of any union of shards follows; `a + b` is that of both.

    `count` is 0-d, `sum_x` `(hidden_x,)`, `sum_y` `(hidden_y,)`, and `xx`, `yy`, `xy` are X'X, Y'Y and X'Y, all of the
    real tokens after `shift_x` and `shift_y` (None = 0) were subtracted from each.
    """

    count: Tensor
    sum_x: Tensor
    sum_y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor
    shift_x: Tensor | None = None
    shift_y: Tensor | None = None

    def __add__(self, other: CkaStatistics) -> CkaStatistics:
        """Add the sums of two shards; raises UserError when different shifts were subtracted from them."""
        for mine, theirs in ((self.shift_x, other.shift_x), (self.shift_y, other.shift_y)):
            if (mine is None) != (theirs is None) or (
                mine is not None and theirs is not None and not torch.equal(mine, theirs)
            ):
                raise UserError(
                    "two CkaStatistics with different shifts cannot be added: give every shard's cka_statistics the "
                    "same shift_x and shift_y, for example the column means of the first shard."
                )
        return CkaStatistics(
            self.count + other.count,
            self.sum_x + other.sum_x,
            self.sum_y + other.sum_y,
            self.xx + other.xx,
            self.yy + other.yy,
            self.xy + other.xy,
            self.shift_x,
            self.shift_y,
        )


@in_full_precision
def cka_statistics(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    shift_x: Tensor | None = None,
    shift_y: Tensor | None = None,
) -> CkaStatistics:
    """Return the sums of one shard; shapes as in `linear_cka`, shifts `(hidden_x,)` and `(hidden_y,)`.

    CKA does not depend on the shifts, but its precision does: sums of uncentred products lose digits when columns are
    far from 0, so give all shards one guess of the column means. Over many shards use float64 inputs.
    """
    rows_x, rows_y = _paired(x, y, mask)
    if shift_x is not None:
        shift_x = shift_x.detach().to(rows_x)
        rows_x = rows_x - shift_x
    if shift_y is not None:
        shift_y = shift_y.detach().to(rows_y)
        rows_y = rows_y - shift_y
    return CkaStatistics(
        count=rows_x.new_tensor(rows_x.shape[0]),
        sum_x=rows_x.sum(0),
        sum_y=rows_y.sum(0),
        xx=rows_x.T @ rows_x,
        yy=rows_y.T @ rows_y,
        xy=rows_x.T @ rows_y,
        shift_x=shift_x,
        shift_y=shift_y,
    )


@in_full_precision
def cka_from_statistics(stats: CkaStatistics) -> Tensor:
    """Return the linear CKA of all tokens that went into `stats`, a 0-d tensor; biased form only.

    The debiased form needs products of squared norms of *centred* rows, which these sums do not hold. Raises UserError
    for fewer than 2 tokens, and where a side does not vary (or not by more than the rounding of the sums).
    """
    if float(stats.count) < fewest_rows(False):
        raise UserError(f"CKA was asked of {int(stats.count)} real tokens, but needs at least 2: add more shards.")
    xx = stats.xx - torch.outer(stats.sum_x, stats.sum_x) / stats.count
    yy = stats.yy - torch.outer(stats.sum_y, stats.sum_y) / stats.count
    xy = stats.xy - torch.outer(stats.sum_x, stats.sum_y) / stats.count
    variance_x, variance_y = xx.trace(), yy.trace()
    rounding = 16 * torch.finfo(xx.dtype).eps
    for name, variance, raw in (("x", variance_x, stats.xx.trace()), ("y", variance_y, stats.yy.trace())):
        if bool(variance <= rounding * raw):
            raise UserError(
                f"CKA is not defined: {name} does not vary over its {int(stats.count)} real tokens by more than the "
                f"rounding of {xx.dtype} sums. Give cka_statistics a shift_{name} near the column means, or float64."
            )
    cross = xy / variance_x.sqrt() / variance_y.sqrt()
    return cross.square().sum() / ((xx / variance_x).norm() * (yy / variance_y).norm())


def _paired(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    same_rows(x, y)
    return in_one_dtype(real_rows(x, mask), real_rows(y, mask))


def _same_number(student: Tensor, target: Side) -> None:
    if student.shape[0] != target.number:
        raise UserError(
            f"the student has {student.shape[0]} real tokens and the cka_target {target.number}, but they are "
            "compared token by token: make the target from the same batch and mask."
        )


def _resolve(form: Form, x: Tensor, y: Tensor) -> Form:
    if form not in ("auto", "feature", "gram"):
        raise UserError(one_of("form", form, ("auto", "feature", "gram")))
    return cheaper_form(x.shape[0], x.shape[1], y.shape[1]) if form == "auto" else form


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _undefined(found: Similarity, needed: int) -> Tensor:
    return (found.flat_x | found.flat_y | (found.count < needed)) & ~found.value.isnan()


def _safe_root(value: Tensor) -> Tensor:
    # Written with <=, which is false for NaN, so that NaN goes through; at 0 the root has no gradient to give.
    zero = value <= 0
    return torch.where(zero, torch.zeros_like(value), torch.where(zero, torch.ones_like(value), value).sqrt())
