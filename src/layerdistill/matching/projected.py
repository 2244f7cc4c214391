"""The distance between a teacher's states and a linear map of the student's, computed together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from layerdistill.core.types import Mean
from layerdistill.matching.hidden import equal_widths, masked_mse, relative_to
from layerdistill.matching.rows import as_factor, autocast_dtype, full_precision, same_rows, upcast


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
    and the distance nothing is kept but their difference, and its gradient is written out: half the passes over
    `(tokens, teacher_width)`, the largest tensors of a hidden term. States and weight are multiplied in the weight's
    dtype, under autocast in autocast's; in bfloat16 the teacher's states and the difference are rounded to it too (in
    float16, which may not hold them, it is `masked_mse` of the product). Sums are float32 at least. Once
    differentiable, in states, weight and bias. Raises UserError when shapes differ.
    """
    same_rows(student, teacher)
    equal_widths(linear.width, teacher.shape[-1])
    dtype = autocast_dtype(student) or linear.weight.dtype
    if dtype == torch.float16:
        return masked_mse(linear_product(student, linear), teacher, None, divide_by_teacher)
    with full_precision(student):
        square = _ProjectedSquare.apply(student, linear.weight, linear.bias, teacher.detach(), dtype)
        total = square / linear.width
        return Mean(relative_to(total, upcast(teacher)) if divide_by_teacher else total, total.new_tensor(len(student)))


def linear_product(states: Tensor, linear: LinearMap) -> Tensor:
    """Return a linear map of `states` `(..., in)`: in the weight's dtype, under autocast multiplied in autocast's.

    What comes out of 16-bit products is given in float32. Once differentiable there, in states, weight and bias.
    """
    dtype = autocast_dtype(states)
    if dtype is None or linear.weight.dtype.itemsize <= dtype.itemsize:
        return functional.linear(states.to(linear.weight.dtype), linear.weight, linear.bias)
    with full_precision(states):
        flat = states.reshape(-1, states.shape[-1])
        found = _Product.apply(flat, linear.weight, dtype)
        found = found if linear.bias is None else found + linear.bias
        return found.view(*states.shape[:-1], linear.width)


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
    """The sum of squares of D = S W' + b - T; with c = 2 x upstream, dS = c D W, dW = c D'S and db = c (sum of D)."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor, dtype: torch.dtype
    ) -> Tensor:
        states, factor = as_factor(student, dtype), weight.to(dtype)
        difference = as_factor(teacher, dtype, copy=True)
        if bias is not None:
            difference[: len(teacher)] -= bias
        # Taken away before the product is rounded, which would lose digits where the two are close.
        difference.addmm_(states, factor.T, beta=-1)
        ctx.save_for_backward(states, factor, difference)
        ctx.rows, ctx.dtypes = len(student), (student.dtype, weight.dtype)
        return _square(difference)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        states, factor, difference = ctx.saved_tensors
        twice = 2 * upstream
        of_student = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_student = upcast((difference @ factor)[: ctx.rows]).mul_(twice).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            of_weight = upcast(difference.T @ states).mul_(twice).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            of_bias = (difference.sum(0, dtype=twice.dtype) * twice).to(ctx.dtypes[1])
        return of_student, of_weight, of_bias, None, None


def _square(rows: Tensor) -> Tensor:
    """Return the sum of squares of `(rows, features)` in float32 at least; of bfloat16 rows to about one part in 10^4.

    Their norms are rounded one by one, which saves a float32 copy of them all; the gradient does not hang on it.
    """
    if rows.dtype == torch.bfloat16:
        return torch.linalg.vector_norm(rows, dim=1).float().square().sum()
    return torch.linalg.vector_norm(rows, dtype=upcast(rows[:0]).dtype).square()
