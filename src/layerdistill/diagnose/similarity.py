"""Linear CKA between every layer of a teacher and every layer of a student, over all tokens of many batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from layerdistill.core.types import Batch, StackName
from layerdistill.diagnose.states import layers_of, paired_states, refuse_more_than_free
from layerdistill.matching.cka_sums import CrossSums, LayerSums, cka_of_sums, cross_sums, layer_sums
from layerdistill.matching.rows import real_rows
from layerdistill.models import widths

Sums = TypeVar("Sums", LayerSums, CrossSums)


def similarity_matrix(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Batch],
    stack: StackName = "",
    debiased: bool = True,
) -> Tensor:
    """Return linear CKA `(student layers, teacher layers)`, from layer 0 on; float64, NaN where a layer is constant.

    Exact over batches: sums over tokens are added, not values. `debiased` is the estimator with HSIC_1 (see
    `matching.linear_cka`), about 0 for unrelated layers however wide; the plain one grows with width / tokens. Raises
    LeftOut where the sums do not fit into memory, UserError for fewer than 2 (4) tokens.
    """
    place = next(teacher.parameters()).device
    refuse_more_than_free(sum_bytes(teacher, student, stack), "the products of all pairs of layers", place)
    ours: list[LayerSums] = []
    theirs: list[LayerSums] = []
    both: list[list[CrossSums]] = []
    for states in paired_states(teacher, student, batches, stack):
        x = [real_rows(layer, states.mask) for layer in states.student]
        y = [real_rows(layer, states.mask) for layer in states.teacher]
        shifts_x = [sums.shift for sums in ours] or [rows.mean(0) for rows in x]
        shifts_y = [sums.shift for sums in theirs] or [rows.mean(0) for rows in y]
        new_x = [layer_sums(rows, shift) for rows, shift in zip(x, shifts_x, strict=True)]
        new_y = [layer_sums(rows, shift) for rows, shift in zip(y, shifts_y, strict=True)]
        crosses = [
            [cross_sums(mine, other, a, b) for other, b in zip(y, shifts_y, strict=True)]
            for mine, a in zip(x, shifts_x, strict=True)
        ]
        ours = added(ours, new_x) if ours else new_x
        theirs = added(theirs, new_y) if theirs else new_y
        both = [added(*rows) for rows in zip(both, crosses, strict=True)] if both else crosses
    return torch.tensor(
        [
            [cka_of_sums(mine, other, cross, debiased) for other, cross in zip(theirs, row, strict=True)]
            for mine, row in zip(ours, both, strict=True)
        ],
        dtype=torch.float64,
    )


def added(first: list[Sums], second: list[Sums]) -> list[Sums]:
    """Return the sums of two sets of tokens, layer by layer."""
    return [a + b for a, b in zip(first, second, strict=True)]


def sum_bytes(teacher: nn.Module, student: nn.Module, stack: StackName) -> float:
    """Return about how many bytes the float64 matrices of all layers and pairs of layers take, with a batch's own."""
    d_s, d_t = widths(student)[stack], widths(teacher)[stack]
    n_s, n_t = len(layers_of(student, stack)), len(layers_of(teacher, stack))
    return 2 * 8.0 * (n_s * d_s**2 + n_t * d_t**2 + n_s * n_t * d_s * d_t)
