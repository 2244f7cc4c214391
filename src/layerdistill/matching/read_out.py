"""Cross-entropy through a frozen head: hidden states in, and no logits of all of them at any time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from layerdistill.core.errors import UserError
from layerdistill.core.types import Mean
from layerdistill.matching.rows import in_full_precision, summed, upcast
from layerdistill.matching.wide_rows import pieces

ReadOut = Callable[[Tensor], Tensor]
"""A function from hidden states `(n, hidden)` to logits `(n, vocab)`, each row by itself, whose weights are frozen."""


class _ReadOutCrossEntropy(torch.autograd.Function):
    """Cross-entropy of what a frozen head reads out of rows; the gradient of the rows is found in the same pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, labels: Tensor, read_out: ReadOut, vocab_size: int) -> Tensor:
        gradient = torch.zeros_like(rows) if rows.requires_grad else None
        values = []
        for piece in pieces(torch.arange(len(rows), device=rows.device), vocab_size, rows.device):
            with torch.enable_grad():
                chosen = rows.detach()[piece].requires_grad_(gradient is not None)
                losses = functional.cross_entropy(upcast(read_out(chosen)), labels[piece], reduction="none")
                total = losses.sum()
            if gradient is not None:
                gradient[piece] = torch.autograd.grad(total, chosen)[0]
            values.append(losses.detach())
        ctx.gradient = gradient
        return torch.cat(values) if values else upcast(rows.new_zeros(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        return ctx.gradient * outer.unsqueeze(-1).to(ctx.gradient.dtype), None, None, None


@in_full_precision
def read_out_cross_entropy(
    rows: Tensor, labels: Tensor, read_out: ReadOut, vocab_size: int, ignore_index: int = -100
) -> Mean:
    """Cross-entropy of `read_out(rows)` with `labels`, a few rows at a time; the count is in labels that are kept.

    `rows` is `(batch, seq, hidden)` with `labels` `(batch, seq)`, or `(tokens, hidden)` with `(tokens,)`. Of the
    `rows x vocab_size` logits only a cache's worth exists at once; the gradient reaches the rows, never the weights of
    `read_out`. Once differentiable. Rows whose label is `ignore_index` are not read. Raises UserError when shapes
    differ.
    """
    if labels.shape != rows.shape[:-1]:
        raise UserError(
            f"labels have shape {tuple(labels.shape)} but hidden states {tuple(rows.shape)}: labels must have the "
            "states' shape without its last axis."
        )
    kept = labels != ignore_index
    return summed(_ReadOutCrossEntropy.apply(rows[kept], labels[kept], read_out, vocab_size))
