"""Slow float64 formulas of the terms, on nested lists, and signals made of given tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerdistill.core.types import LayerRef, Pair, Signal

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
"""Three texts of 5, 3 and 2 tokens."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(width: int, layers: int, seed: int) -> dict[LayerRef, Tensor]:
    """Hidden states of layers 0 to `layers` and `final`; NaN on padding, which no term may see."""
    found = {}
    for number in (*range(layers + 1), -1):
        made = draw(*MASK.shape, width, seed=100 * seed + number)
        made[MASK == 0] = float("nan")
        found[LayerRef("", number)] = made
    return found


def signal(hidden: dict[LayerRef, Tensor] | None = None, logits: Tensor | None = None) -> Signal:
    return Signal(logits, hidden or {}, {"": MASK})


def pair_of(task: str = "sequence-classification", widths: tuple[int, int] = (4, 6), **options: int | None) -> Pair:
    """A student of 2 blocks and a teacher of 4, known by their shapes only."""
    return Pair(
        None, torch.nn.Identity(), task, {"": 4}, {"": 2}, {"": widths[1]}, {"": widths[0]},
        options.get("vocab_size"), int(options.get("seed") or 0),
    )  # fmt: skip


def real(hidden: Tensor) -> list[list[float]]:
    """The states of the real tokens as lists."""
    return [
        hidden[text, place].double().tolist()
        for text in range(MASK.shape[0])
        for place in range(MASK.shape[1])
        if MASK[text, place]
    ]


def probabilities(scores: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(score / temperature) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softened_kl(student: list[list[float]], teacher: list[list[float]], temperature: float) -> float:
    """T squared times the mean over rows of KL(teacher || student)."""
    rows = [
        kl(probabilities(theirs, temperature), probabilities(ours, temperature))
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return temperature**2 * sum(rows) / len(rows)


def squared_error(student: list[list[float]], teacher: list[list[float]]) -> float:
    """Mean over rows of the mean over their entries."""
    rows = [
        sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / len(ours)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return sum(rows) / len(rows)


def times(rows: list[list[float]], weight: list[list[float]]) -> list[list[float]]:
    """Each row through a linear map `(out, in)`."""
    return [[sum(w * x for w, x in zip(line, row, strict=True)) for line in weight] for row in rows]


def centred_kernel(rows: list[list[float]]) -> list[list[float]]:
    """Inner products of the rows after their mean is subtracted."""
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    centred = [[x - m for x, m in zip(row, mean, strict=True)] for row in rows]
    return [[sum(a * b for a, b in zip(one, other, strict=True)) for other in centred] for one in centred]


def inner(one: list[list[float]], other: list[list[float]]) -> float:
    return sum(a * b for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def cka(student: list[list[float]], teacher: list[list[float]]) -> float:
    """<K, L> / sqrt(<K, K> <L, L>) of centred linear kernels (Kornblith et al. 2019)."""
    k, l_ = centred_kernel(student), centred_kernel(teacher)
    return inner(k, l_) / math.sqrt(inner(k, k) * inner(l_, l_))
