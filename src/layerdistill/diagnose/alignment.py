"""A student's layer in the teacher's space: as it is where the widths are equal, else rotated there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from layerdistill.core.types import Batch, StackName
from layerdistill.diagnose.states import layers_of, paired_states
from layerdistill.matching.rows import real_rows
from layerdistill.models import widths

Alignment = Literal["none", "orthogonal"]
"""`none`: equal widths, states compared as they are. `orthogonal`: a narrower student's states times Q, Q Q' = I."""


def alignment_of(teacher: nn.Module, student: nn.Module, stack: StackName) -> Alignment:
    """Return how the student's states come into the teacher's space: a matter of the widths alone."""
    return "none" if widths(teacher)[stack] == widths(student)[stack] else "orthogonal"


def rotations(
    teacher: nn.Module, student: nn.Module, batches: Sequence[Batch], stack: StackName
) -> list[Tensor | None]:
    """Return what each layer of the student is multiplied by, `(width_s, width_t)`; None where widths are equal.

    Q of layer s is the least-squares (Procrustes) solution of `min sum_i |S_s Q - T_i|^2` over all teacher layers i and
    all real tokens with `Q Q' = I`: `U V'` of the singular value decomposition of `S_s' sum_i T_i`. It keeps lengths,
    and so the norm-matched null; it favours no teacher layer. It is fitted to the very tokens it is then used on.
    """
    if alignment_of(teacher, student, stack) == "none":
        return [None] * len(layers_of(student, stack))
    products: list[Tensor] = []
    for states in paired_states(teacher, student, batches, stack):
        target = sum(real_rows(layer, states.mask) for layer in states.teacher)
        assert isinstance(target, Tensor)
        found = [(real_rows(layer, states.mask).T @ target).double() for layer in states.student]
        products = [a + b for a, b in zip(products, found, strict=True)] if products else found
    return [procrustes(product) for product in products]


def procrustes(product: Tensor) -> Tensor:
    """Return the Q with orthonormal rows that maximises `trace(Q' product)`; `product` is `(narrow, wide)`, float32."""
    u, _, v = torch.linalg.svd(product, full_matrices=False)
    return (u @ v).float()


def rotated(states: Tensor, rotation: Tensor | None) -> Tensor:
    """Return `(batch, seq, width)` states in the teacher's space, in float32."""
    return states.float() if rotation is None else states.float() @ rotation
