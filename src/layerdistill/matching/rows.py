"""Which rows a loss may look at, and in which precision: real tokens only, float32 or better, autocast off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import Mean

ROUND_ROWS = 256
"""Rows of factors of 16 bits are as many as the next multiple of this."""

P = ParamSpec("P")
R = TypeVar("R")


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with autocast switched off on the device of its first tensor argument."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next((given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)), None)
        with torch.autocast(first.device.type if first is not None else "cpu", enabled=False):
            return function(*args, **kwargs)

    return wrapped


def full_precision(values: Tensor) -> torch.autocast:
    """Return a context in which autocast is switched off on the device of `values`."""
    return torch.autocast(values.device.type, enabled=False)


def autocast_dtype(values: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives products with `values`, None where it is off or leaves them as they are."""
    device = values.device.type
    if not torch.is_autocast_enabled(device) or values.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def factor_dtype(values: Tensor) -> torch.dtype | None:
    """Return bfloat16 where autocast asks for it, else None: a loss multiplies in its own precision.

    Not float16, which holds neither every hidden state (some are above 65,504) nor sums of squares.
    """
    return torch.bfloat16 if autocast_dtype(values) == torch.bfloat16 else None


def upcast(values: Tensor) -> Tensor:
    """Return `values` in float32, or in float64 if they were."""
    return values if values.dtype == torch.float64 else values.float()


def as_factor(rows: Tensor, dtype: torch.dtype, *, minus: Tensor | None = None, copy: bool = False) -> Tensor:
    """Return `(rows, features)` as factors of products in `dtype`; of 16 bits with zero rows up to a round number.

    `minus` `(features,)` is taken from each of the rows on the way; it is rounded to 16 bits only where they are.
    `copy` makes sure that it is not `rows` itself. Products of 16 bits are made by code that is compiled for each new
    number of rows and kept (oneDNN, on a processor: half a millisecond, four times what the product of a thousand rows
    takes, and 0.7 MB), and no two batches have as many real tokens.
    """
    if dtype.itemsize > 2:
        if minus is None:
            return rows.to(dtype, copy=copy)
        wide = rows.to(dtype)
        return wide - minus if wide is rows else wide.sub_(minus)
    if rows.dtype.itemsize == 2 and rows.dtype != dtype:
        rows = rows.float()  # processors go from float16 to bfloat16 slowly
    padded = rows.new_empty(-(-len(rows) // ROUND_ROWS) * ROUND_ROWS, rows.shape[1], dtype=dtype)
    if minus is None:
        padded[: len(rows)] = rows
    else:
        torch.sub(rows, minus.to(rows.dtype), out=padded[: len(rows)])  # of two dtypes it takes three times as long
    padded[len(rows) :] = 0
    return padded


def real_rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of `(..., features)` where `mask`, shaped `(...)`, is not 0, as `(rows, features)`, upcast.

    Rows are selected, not multiplied by the mask: what stands in padding, NaN included, reaches neither the value nor
    the gradient. Raises UserError when the shapes do not fit.
    """
    return upcast(real_rows_as_they_are(values, mask))


def real_rows_as_they_are(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of `real_rows` in the dtype of `values`."""
    if values.dim() < 2:
        raise UserError(
            f"features have shape {tuple(values.shape)}, but must be (batch, seq, hidden) or (tokens, hidden): add the "
            "missing axis, for example with .unsqueeze(-1)."
        )
    flat = values.reshape(-1, values.shape[-1])
    return flat if mask is None else flat.index_select(0, real_row_numbers(values, mask))


def real_row_numbers(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the numbers, `(rows,)`, of the rows of `(..., features)` that `mask` keeps, counted over all leading axes.

    Raises UserError when the shapes do not fit.
    """
    if mask is None:
        return torch.arange(values[..., 0].numel(), device=values.device)
    if mask.shape != values.shape[:-1]:
        raise UserError(
            f"the mask has shape {tuple(mask.shape)}, but must have the shape of the features without their last axis, "
            f"{tuple(values.shape[:-1])}: 1 (or True) on real tokens, 0 on padding."
        )
    return mask.reshape(-1).to(values.device).ne(0).nonzero().squeeze(1)


def same_rows(student: Tensor, teacher: Tensor) -> None:
    """Raise UserError unless both sides have the same batch and sequence axes."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise UserError(
            f"the student has shape {tuple(student.shape)} and the teacher {tuple(teacher.shape)}: all axes but the "
            "last must be equal, because the two are compared token by token. Give both models the same batch."
        )


def in_one_dtype(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors in the wider of their dtypes."""
    wider = torch.promote_types(first.dtype, second.dtype)
    return first.to(wider), second.to(wider)


def square_sum(rows: Tensor) -> Tensor:
    """Return the sum of squares of `(rows, features)` in float32 at least.

    The norms of bfloat16 rows are rounded one by one, which saves a float32 copy of them. Row by row in any case: over
    all numbers at once torch adds up in their order on a processor, and loses 0.05 % of eight million float32.
    """
    return upcast(torch.linalg.vector_norm(rows, dim=1)).square().sum()


def summed(per_row: Tensor) -> Mean:
    """Return the mean over rows of a `(rows,)` tensor as a sum and a count."""
    return Mean(per_row.sum(), counted(per_row))


def counted(rows: Tensor) -> Tensor:
    """Return the number of rows as a 0-d tensor beside them, for which no host waits for its accelerator."""
    return rows.new_full((), len(rows))
