"""The losses of a language model's predictions from hidden states and heads, a chunk of tokens at a time.

The logits of all tokens, 50 thousand numbers each, are never there: a chunk's logits are made in a buffer, turned into
losses and then into their own gradient in it, and the next chunk takes their place. What the forward pass leaves behind
is the gradient of the states and of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerdistill.core.errors import UserError
from layerdistill.core.types import Mean, TopK, TopTokens
from layerdistill.matching.logits import Divergence
from layerdistill.matching.rows import autocast_dtype, in_full_precision
from layerdistill.matching.vocabulary_head import HeadGradients, Projection, VocabularyHead
from layerdistill.matching.vocabulary_rows import RowLosses, cap_, through_cap_

FEWEST_ROWS = 128
"""Tokens in a chunk, where the vocabulary is large: enough for matrix products at full speed."""

CHUNK = {"cpu": 2**20}
"""Logits in a chunk, where the vocabulary is small; elsewhere OTHER_CHUNK, for which kernels are worth starting."""

OTHER_CHUNK = 2**27

PIECE = {"cpu": 2**18}
"""Logits that the arithmetic goes over at a time, to stay in the processor's cache; elsewhere a whole chunk."""

Weights = tuple[float, float]
"""What cross-entropy and divergence are multiplied by."""


@dataclass(frozen=True)
class VocabularyPart:
    """What a term makes of a language model's logits: the loss on the labels (`task`), or a divergence (`logits`)."""

    kind: Literal["task", "logits"]
    divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    vocab_size: int | None = None
    top: TopK | None = None
    """What is read of the teacher in place of its states, if only its likeliest tokens are."""


def vocabulary_losses(
    student_rows: Tensor,
    student_head: VocabularyHead,
    labels: Tensor,
    teacher_rows: Tensor | None = None,
    teacher_head: VocabularyHead | None = None,
    teacher_top: TopTokens | None = None,
    *,
    task_weight: float | None = 1.0,
    logits_weight: float = 1.0,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Mean | None, Mean | None]:
    """Return the cross-entropy with `labels` and `T^2` times the divergence from the teacher, summed over rows.

    `student_rows` and `teacher_rows` are `(n, hidden)` of either model, as they enter its head, and `labels` `(n,)`:
    only rows with a label are given. In place of the teacher's rows and head there may be its likeliest tokens of each
    row, `teacher_top`, at this temperature (see `top_k`); its head is then not needed. The first mean is None where
    `task_weight` is, the second without a teacher. The weights are what the two will be multiplied by; they change no
    value. Gradients in that ratio are made in the forward pass, and made anew in the backward pass when another ratio
    comes back (to see it costs a host synchronisation). They reach the student's rows, weight and bias; once
    differentiable.

    `divergence` and `vocab_size` are as in `logits.py`. Matrix products are made in autocast's dtype or the weight's,
    the rest in float32 (float64 if a head's is). Raises UserError for shapes and settings that do not fit.
    """
    width = _compared_width(student_head, teacher_head, temperature, vocab_size)
    known = _refuse_unfitting(student_rows, labels, teacher_rows, teacher_head, teacher_top)
    # Without them the teacher's rows are of width 0, and nobody reads them.
    teacher_rows = student_rows[:, :0].detach() if teacher_rows is None else teacher_rows.detach()
    rows, head = student_head.without_scale(student_rows)
    if teacher_head is not None:
        teacher_rows, teacher_head = teacher_head.without_scale(teacher_rows)
    work = _Work(
        labels.to(rows.device) if task_weight is not None else None,
        teacher_rows,
        teacher_head,
        teacher_top,
        (task_weight or 0.0, logits_weight if known else 0.0),
        (product_dtype(head.weight), product_dtype((teacher_head or head).weight)),
        head.cap,
        divergence,
        temperature,
        width,
    )
    if torch.is_grad_enabled():
        task, logits = _VocabularyLoss.apply(rows, head.weight, head.bias, work)
    else:
        task, logits, _ = work.run(rows, head.weight, head.bias, work.weights, (False, False, False))
    count = task.new_tensor(len(labels))
    return (
        Mean(task, count) if task_weight is not None else None,
        Mean(logits, count) if known else None,
    )


def _refuse_unfitting(
    student_rows: Tensor,
    labels: Tensor,
    teacher_rows: Tensor | None,
    teacher_head: VocabularyHead | None,
    teacher_top: TopTokens | None,
) -> bool:
    """Return whether there is a teacher; raises UserError where it is said by halves or twice, or of other rows."""
    if (teacher_rows is None) != (teacher_head is None):
        raise UserError(
            "of teacher_rows and teacher_head only one is given: give both, or neither for the labels alone."
        )
    if teacher_top is not None and teacher_rows is not None:
        raise UserError("teacher_rows and teacher_top are both given: give one of them.")
    theirs = teacher_rows if teacher_top is None else teacher_top.ids
    if labels.shape != student_rows.shape[:1] or (theirs is not None and len(theirs) != len(labels)):
        raise UserError(
            f"there are {len(student_rows)} rows of the student, {0 if theirs is None else len(theirs)} of the teacher "
            f"and labels of the shape {tuple(labels.shape)}: give one of each per token."
        )
    return theirs is not None


@dataclass(frozen=True)
class _Work:
    """What a call computes, of a student whose tensors come with it; `dtypes` are those of either model's products."""

    labels: Tensor | None
    teacher_rows: Tensor
    teacher: VocabularyHead | None
    likeliest: TopTokens | None
    weights: Weights
    dtypes: tuple[torch.dtype, torch.dtype]
    cap: float | None
    divergence: Divergence
    temperature: float
    width: int

    @in_full_precision
    def run(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, weights: Weights, wanted: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, HeadGradients]:
        """Return the two totals and the gradient of their weighted sum in rows, weight and bias, where it is wanted."""
        full = torch.float64 if torch.float64 in self.dtypes else torch.float32
        values = rows.new_zeros(2, len(rows), dtype=full)
        most, few = _sizes(len(rows), len(weight), rows.device.type)
        ours = Projection(weight, bias, most, self.dtypes[0], values)
        theirs = None
        if self.teacher is not None:
            cut = None if self.teacher.bias is None else self.teacher.bias[: self.width]
            theirs = Projection(self.teacher.weight[: self.width], cut, most, self.dtypes[1], values)
        excludes = theirs is not None and theirs.bias is not None
        slope = values.new_empty(few, len(weight))
        losses = RowLosses(self.divergence, self.temperature, self.width, slope, excludes)
        gradients = HeadGradients(rows, ours, wanted)
        for part in _slices(len(rows), most):
            logits = ours(rows[part])
            teacher = theirs(self.teacher_rows[part]) if theirs is not None else None
            for piece in _slices(len(logits), few):
                place = slice(part.start + piece.start, part.start + piece.stop)
                self._piece(
                    losses, logits[piece], None if teacher is None else teacher[piece], values[:, place], place, weights
                )
            if any(wanted):
                gradients.add(logits, rows[part], part)
        return values[0].sum(), values[1].sum(), gradients

    def _piece(
        self, losses: RowLosses, logits: Tensor, teacher: Tensor | None, values: Tensor, place: slice, weights: Weights
    ) -> None:
        """Put the losses of a few rows into `values`, and their slope into the place of `logits`."""
        cap_(logits, self.cap)
        slope = losses.slope[: len(logits)]
        if self.labels is not None:
            values[0] = losses.cross_entropy(logits, self.labels[place], slope, weights[0])
        else:
            slope.zero_()
        if self.likeliest is not None:
            top = TopTokens(self.likeliest.ids[place], self.likeliest.log_probabilities[place])
            values[1] = losses.divergence_of_likeliest(logits, top, slope, weights[1])
        elif teacher is not None and self.teacher is not None:
            values[1] = losses.divergence(logits, cap_(teacher, self.teacher.cap), slope, weights[1])
        through_cap_(slope, logits, self.cap)


class _VocabularyLoss(torch.autograd.Function):
    """The two totals, with the gradient of their weighted sum made on the way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, weight, bias)
        ctx.work = work
        task, logits, ctx.gradients = work.run(rows, weight, bias, work.weights, ctx.needs_input_grad[:3])
        return task, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, gradients = _numbers(outer), ctx.gradients
        factor = _common_factor(weights, ctx.work.weights, gradients.dtype)
        if factor is None:
            *_, gradients = ctx.work.run(*ctx.saved_tensors, weights, ctx.needs_input_grad[:3])
            factor = 1.0
        made = zip((gradients.rows, gradients.weight, gradients.bias), ctx.saved_tensors, strict=True)
        # A product of its own: what is stored may be asked for again.
        return (*(None if found is None else (found * factor).to(like.dtype) for found, like in made), None)


def _numbers(outer: tuple[Tensor | None, ...]) -> Weights:
    """Return the two gradients that come back as numbers; what did not come back is 0."""
    known = [found for found in outer if found is not None]
    numbers = iter(torch.stack(known).tolist() if known else [])
    task, logits = (0.0 if found is None else next(numbers) for found in outer)
    return task, logits


def _common_factor(found: Weights, expected: Weights, dtype: torch.dtype) -> float | None:
    """Return by what `expected` is to be multiplied to give `found`, None where no factor does, but for rounding."""
    largest = 0 if abs(expected[0]) >= abs(expected[1]) else 1
    factor = found[largest] / expected[largest] if expected[largest] else 0.0
    rounding = 4 * torch.finfo(dtype).eps
    same = all(abs(a - factor * b) <= rounding * abs(a) for a, b in zip(found, expected, strict=True))
    return factor if same else None


def _sizes(rows: int, vocabulary: int, device: str) -> tuple[int, int]:
    """Return how many rows a chunk has, and how many of them the arithmetic goes over at a time."""
    chunk = min(max(CHUNK.get(device, OTHER_CHUNK) // vocabulary, FEWEST_ROWS), max(rows, 1))
    return chunk, min(max(PIECE[device] // vocabulary, 1), chunk) if device in PIECE else chunk


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _compared_width(
    student: VocabularyHead, teacher: VocabularyHead | None, temperature: float, vocab_size: int | None
) -> int:
    """Return how many logits are compared; raises UserError for what cannot be."""
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}, but must be greater than 0; 1 leaves the logits as they are.")
    smaller = min(student.vocabulary, (teacher or student).vocabulary)
    width = smaller if vocab_size is None else vocab_size
    if not 2 <= width <= smaller:
        raise UserError(
            f"vocab_size is {width}, but must be from 2 to {smaller}: the student has {student.vocabulary} logits and "
            f"the teacher {(teacher or student).vocabulary}."
        )
    return width


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return in which dtype a linear layer with this weight multiplies: autocast's where it is on, else its own."""
    return autocast_dtype(weight) or weight.dtype
