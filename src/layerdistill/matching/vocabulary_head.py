"""The head of a language model as matrices, its logits of a chunk of rows in one buffer, and their way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALF_OF_FLOAT16 = 2.0**15
"""Half of the largest number of a float16."""


@dataclass(frozen=True)
class VocabularyHead:
    """What makes logits of states: `scale * (states @ weight.T + bias)`, then `cap * tanh(logits / cap)` with a cap.

    `weight` is `(vocab, hidden)`, `bias` `(vocab,)`.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def vocabulary(self) -> int:
        """The number of logits."""
        return len(self.weight)

    def without_scale(self, rows: Tensor) -> tuple[Tensor, VocabularyHead]:
        """Return rows and a head without a scale that make the same logits before the cap."""
        if self.scale == 1.0:
            return rows, self
        bias = None if self.bias is None else self.bias * self.scale
        return rows * self.scale, VocabularyHead(self.weight, bias, 1.0, self.cap)


class Projection:
    """Logits of at most `most` rows at a time, without scale and cap: each call overwrites what the last one gave."""

    def __init__(self, weight: Tensor, bias: Tensor | None, most: int, dtype: torch.dtype, like: Tensor) -> None:
        """Products are made in `dtype` and given in that of `like`."""
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.product = self.weight.new_empty(most, len(weight))
        self.logits = self.product if dtype == like.dtype else like.new_empty(most, len(weight))

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the logits `(n, vocab)` of rows `(n, hidden)`."""
        product, logits = self.product[: len(rows)], self.logits[: len(rows)]
        rows = rows.to(self.weight.dtype)
        if self.bias is None:
            torch.mm(rows, self.weight.t(), out=product)
        else:
            torch.addmm(self.bias, rows, self.weight.t(), out=product)
        return logits if logits.dtype == product.dtype else logits.copy_(product)


def shrinking(slope: Tensor, rows: Tensor) -> Tensor:
    """Return what `slope` is divided by, at least 1, so that no sum over the rows of slope x row exceeds a float16.

    The gradient is divided by the number of labels only at the end, where a loss scale cannot help any more.
    """
    largest = [torch.linalg.vector_norm(given, ord=float("inf")).float() for given in (slope, rows)]
    return (largest[0] * largest[1] * (len(slope) / HALF_OF_FLOAT16)).clamp(min=1.0)


class HeadGradients:
    """The gradient of all rows, of the weight and of the bias, added up chunk by chunk in full precision.

    `rows`, `weight` and `bias` are None where they are not wanted.
    """

    def __init__(self, rows: Tensor, head: Projection, wanted: Sequence[bool]) -> None:
        """`wanted` says which of the three are made."""
        full, weight = head.logits, head.weight
        self.head = head
        self.dtype = full.dtype
        self.rows = full.new_empty(rows.shape) if wanted[0] else None
        self.weight = full.new_zeros(weight.shape) if wanted[1] else None
        self.bias = full.new_zeros(len(weight)) if wanted[2] else None
        self.product = weight.new_empty(weight.shape) if wanted[1] and weight.dtype != full.dtype else None

    def add(self, slope: Tensor, rows: Tensor, part: slice) -> None:
        """Add what `slope`, `(n, vocab)` in the logits of the rows in `part`, comes to."""
        weight = self.head.weight
        if self.bias is not None:
            self.bias.add_(slope.sum(0))
        if slope.dtype != weight.dtype:
            slope = self.head.product[: len(slope)].copy_(slope)
        if self.rows is not None:
            self.rows[part] = slope @ weight
        if self.weight is not None and self.product is not None:
            shrink = shrinking(slope, rows) if weight.dtype == torch.float16 else None
            slope = slope if shrink is None else slope.div_(shrink)  # the copy that was made above
            product = torch.mm(slope.t(), rows.to(weight.dtype), out=self.product)
            self.weight.add_(product) if shrink is None else self.weight.addcmul_(product, shrink)
        elif self.weight is not None:
            self.weight.addmm_(slope.t(), rows.to(weight.dtype))
