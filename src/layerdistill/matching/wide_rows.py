"""Losses over a wide last axis (a vocabulary), a few rows at a time, with the gradient written down in the same pass.

The plain form makes six tensors of rows x vocabulary and lets autograd keep them; most of its time goes into the page
faults of such tensors. Here a piece of rows stays in the processor's cache, and only the gradient has the full size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from layerdistill.matching.rows import upcast

PIECE = {"cpu": 2**20}
"""Elements per piece: what a processor's cache holds; elsewhere OTHER_PIECE, for which a kernel is worth starting."""

OTHER_PIECE = 2**26

RowLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A function of the student's rows `(n, width)`, the teacher's rows or labels, and where to put the gradient's rows."""


def pieces(rows: Tensor, width: int, device: torch.device) -> Iterator[Tensor]:
    """Yield row numbers, `(n,)`, a piece at a time."""
    yield from rows.split(rows_at_once(width, device)) if len(rows) else ()


def rows_at_once(width: int, device: torch.device) -> int:
    """Return how many rows of that width are worked on at a time."""
    return max(PIECE.get(device.type, OTHER_PIECE) // max(width, 1), 1)


class _WideKl(torch.autograd.Function):
    """KL(teacher || student) of selected rows, at a temperature, over the first `width` entries."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor, width: int, temperature: float) -> Tensor:
        wanted = student.requires_grad
        gradient = torch.zeros_like(student) if wanted else None
        values = []
        for piece in pieces(rows, width, student.device):
            log_s = _log_probabilities(student, piece, width, temperature)
            log_t = _log_probabilities(teacher, piece, width, temperature)
            p_t = log_t.exp()
            gap = (log_t - log_s).masked_fill_(log_t == -torch.inf, 0.0)
            values.append((p_t * gap).sum(-1))
            if gradient is not None:
                gradient[piece, :width] = (log_s.exp_().sub_(p_t) / temperature).to(gradient.dtype)
        ctx.gradient, ctx.rows = gradient, rows
        return torch.cat(values) if values else upcast(student.new_zeros(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        return _spread(ctx.gradient, ctx.rows, outer), None, None, None, None


class _WideCrossEntropy(torch.autograd.Function):
    """Cross-entropy of selected rows with their labels."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        gradient = torch.zeros_like(logits) if logits.requires_grad else None
        values = []
        for piece in pieces(rows, logits.shape[1], logits.device):
            log_p = _log_probabilities(logits, piece, logits.shape[1], 1.0)
            targets = labels[piece]
            values.append(functional.nll_loss(log_p, targets, reduction="none"))
            if gradient is not None:
                slope = log_p.exp_()
                slope[torch.arange(len(piece), device=slope.device), targets] -= 1
                gradient[piece] = slope.to(gradient.dtype)
        ctx.gradient, ctx.rows = gradient, rows
        return torch.cat(values) if values else upcast(logits.new_zeros(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, None]:
        return _spread(ctx.gradient, ctx.rows, outer), None, None


def kl_of_rows(student: Tensor, teacher: Tensor, rows: Tensor, width: int, temperature: float) -> Tensor:
    """Return KL(softmax(teacher/T) || softmax(student/T)), `(n,)`, of the numbered rows of `(all rows, vocab)` logits.

    Value and gradient are exactly 0 where the two are equal; only once differentiable. In float32 or float64.
    """
    return _WideKl.apply(student, teacher, rows, width, temperature)


def cross_entropy_of_rows(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Return the cross-entropy, `(n,)`, of the numbered rows of `(all rows, vocab)` logits; once differentiable."""
    return _WideCrossEntropy.apply(logits, labels, rows)


def _log_probabilities(logits: Tensor, piece: Tensor, width: int, temperature: float) -> Tensor:
    chosen = upcast(logits.index_select(0, piece)[:, :width])
    return (chosen if temperature == 1.0 else chosen / temperature).log_softmax(-1)


def _spread(gradient: Tensor, rows: Tensor, outer: Tensor) -> Tensor:
    """Return the stored gradient times what comes from above, without changing it: it may be asked for again."""
    scale = outer.new_zeros(len(gradient)).index_copy(0, rows, outer)
    return gradient * scale.to(gradient.dtype).unsqueeze(-1)
