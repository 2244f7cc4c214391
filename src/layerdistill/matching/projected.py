"""The distance between a teacher's states and a linear map of the student's, computed together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from layerdistill.core.types import Mean
from layerdistill.matching.hidden import equal_widths, relative_to
from layerdistill.matching.rows import as_factor, factor_dtype, full_precision, same_rows, square_sum, upcast

R = TypeVar("R")


class LinearMap(NamedTuple):
    """`states @ weight.T + bias`, with `weight` `(out, in)` and `bias` `(out,)` or None."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def width(self) -> int:
        """The width of what it gives."""
        return self.weight.shape[0]


def projected_mse(student: Tensor, linear: LinearMap, teacher: Tensor, divide_by_teacher: bool = False) -> Mean:
    """`masked_mse` of the student's states after a linear map: the same value, with the map's product in one step.

    `student` is `(tokens, student_width)` and `teacher` `(tokens, teacher_width)`, all of them real. Between the map
    and the distance nothing is made but their difference, and its gradient is written out: half the passes over
    `(tokens, teacher_width)`, the largest tensors of a hidden term, of which none is kept. No gradient reaches the
    teacher. Once differentiable, in states, weight and bias.

    Computed in the weight's dtype, float32 sums at least. Under autocast to bfloat16 the factors of all products are
    rounded to it, the difference and what the products give among them, and in the value (not in the gradient) the norm
    of each token's difference: less than 0.8 % of one token, less by the root of their number of many. Raises UserError
    when shapes differ.
    """
    teacher = teacher.detach()
    same_rows(student, teacher)
    equal_widths(linear.width, teacher.shape[-1])
    dtype = factor_dtype(student) or linear.weight.dtype
    with full_precision(student):
        trained = torch.is_grad_enabled()
        total = _ProjectedSquare.apply(student, linear.weight, linear.bias, teacher, dtype, trained) / linear.width
        count = total.new_full((), len(student))
        return Mean(relative_to(total, upcast(teacher)) if divide_by_teacher else total, count)


def linear_product(states: Tensor, linear: LinearMap) -> Tensor:
    """Return a linear map of `states` `(..., in)` in the weight's dtype.

    Under autocast to bfloat16 the factors are rounded to it, and the product is given in float32 all the same. Once
    differentiable then, in states, weight and bias.
    """
    dtype = factor_dtype(states)
    with full_precision(states):
        if dtype is None or linear.weight.dtype.itemsize <= dtype.itemsize:
            return functional.linear(states.to(linear.weight.dtype), linear.weight, linear.bias)
        found = _Product.apply(states.reshape(-1, states.shape[-1]), linear.weight, dtype)
        found = found if linear.bias is None else found + linear.bias
        return found.view(*states.shape[:-1], linear.width)


class MapLinear(nn.Linear):
    """A linear layer that hands its map, with the states, to any function of the two.

    The weight is read while the module runs, because FSDP and DeepSpeed put it together only then.
    """

    def forward(self, states: Tensor, then: Callable[[Tensor, LinearMap], R] = linear_product) -> R:  # type: ignore[assignment]
        """Return what `then` makes of `states` `(..., in)` and the map; by default their product."""
        with full_precision(states):  # an orthogonal weight is computed here, and would not be orthogonal in bfloat16
            linear = LinearMap(self.weight, self.bias)
        return then(states, linear)


class _Product(torch.autograd.Function):
    """P = S W'; dS = dP W and dW = dP'S."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        factors = as_factor(states, dtype), weight.to(dtype)
        ctx.save_for_backward(*factors)
        ctx.dtypes = states.dtype, weight.dtype
        return upcast((factors[0] @ factors[1].T)[: len(states)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        states, factor = ctx.saved_tensors
        given = as_factor(upstream, factor.dtype)
        of_states = (given @ factor)[: len(upstream)].to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        of_weight = (given.T @ states).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return of_states, of_weight, None


class _ProjectedSquare(torch.autograd.Function):
    """The sum of squares of D = S W' + b - T; with c = 2 x upstream, dS = c D W, dW = c D'S and db = c (sum of D).

    All but c is computed at once, so that no rows of the teacher's width are kept until the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Tensor,
        dtype: torch.dtype,
        trained: bool,
    ) -> Tensor:
        wanted = [trained and needed for needed in ctx.needs_input_grad]  # it does not know of no_grad
        states, factor = as_factor(student, dtype), weight.to(dtype)
        difference = as_factor(teacher, dtype, minus=bias, copy=True)
        # Taken away before the product is rounded, which would lose digits where the two are close.
        difference.addmm_(states, factor.T, beta=-1)
        of_student = upcast((difference @ factor)[: len(student)]) if wanted[0] else None
        of_weight = upcast(difference.T @ states) if wanted[1] else None
        of_bias = difference.sum(0, dtype=upcast(difference[:0]).dtype) if wanted[2] else None
        ctx.save_for_backward(of_student, of_weight, of_bias)
        ctx.dtypes = student.dtype, weight.dtype, weight.dtype
        return square_sum(difference)  # whose rounding the gradient does not see

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        twice = 2 * upstream
        given = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *((None if found is None else (found * twice).to(dtype)) for found, dtype in given), None, None, None
