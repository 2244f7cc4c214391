"""How much a block changes what passes through it: the nearer to the identity, the less it is missed."""

from __future__ import annotations

import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import Mean
from layerdistill.matching.rows import in_full_precision, in_one_dtype, same_rows, upcast


@in_full_precision
def block_influence(entering: Tensor, leaving: Tensor, mask: Tensor | None = None) -> Mean:
    """`1 - cos` of a block's input and output, averaged over the real tokens of a sequence, then over sequences.

    Both are `(batch, seq, hidden)`, `mask` `(batch, seq)`. The count is in sequences with a real token; range 0 to 2.
    Source: ShortGPT (Men et al. 2024, https://arxiv.org/abs/2403.03853), Block Influence; there the last block's
    output may be taken after the final norm, here it is whatever is given. Two equal vectors have the cosine 1, also
    when both are 0. Raises UserError when shapes differ.
    """
    first, second, real = _aligned(entering, leaving, mask)
    u, v = _units(first), _units(second)
    # Half the squared distance of unit vectors: 1 - <u, v> would leave a rounding error at equality.
    distance = torch.where((first == second).all(-1), 0.0, (u - v).square().sum(-1) / 2 + _missing(u, v))
    tokens = real.sum(1)
    per_sequence = torch.where(real, distance, 0.0).sum(1) / tokens.clamp(min=1)
    return Mean(per_sequence.sum(), (tokens > 0).sum().to(per_sequence))


@in_full_precision
def angular_distance(entering: Tensor, leaving: Tensor, mask: Tensor | None = None) -> Mean:
    """The angle of a block's input and output at the last real token of each sequence, divided by pi; range 0 to 1.

    Shapes and count as in `block_influence`. Source: Gromov et al. 2024, "The Unreasonable Ineffectiveness of the
    Deeper Layers", https://arxiv.org/abs/2403.17887, arccos(cos)/pi. Deviations: of single blocks, where they take the
    run of n blocks with the smallest distance; computed with an arctangent, because arccos loses half its digits near
    0. A zero vector stands at a right angle to all others. Raises UserError when shapes differ.
    """
    first, second, real = _aligned(entering, leaving, mask)
    last = real.shape[1] - 1 - real.flip(1).to(torch.uint8).argmax(1)
    rows = torch.arange(len(last), device=last.device)
    first, second = first[rows, last], second[rows, last]
    u, v = _units(first), _units(second)
    angle = 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))
    angle = torch.where(_missing(u, v) > 0, torch.pi / 2, angle)
    angle = torch.where((first == second).all(-1), 0.0, angle)
    some = real.any(1)
    return Mean(torch.where(some, angle / torch.pi, 0.0).sum(), some.sum().to(angle))


def _aligned(entering: Tensor, leaving: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return both states with zeros on padding, and which tokens are real."""
    same_rows(entering, leaving)
    if entering.dim() != 3 or entering.shape != leaving.shape:
        raise UserError(
            f"the block's input has shape {tuple(entering.shape)} and its output {tuple(leaving.shape)}: both must be "
            "(batch, seq, hidden), equally wide."
        )
    real = torch.ones(entering.shape[:2], dtype=torch.bool, device=entering.device) if mask is None else mask.ne(0)
    if real.shape != entering.shape[:2]:
        raise UserError(f"the mask has shape {tuple(real.shape)}, but must be {tuple(entering.shape[:2])}.")
    first, second = in_one_dtype(upcast(entering), upcast(leaving))
    padding = ~real.unsqueeze(-1)
    return first.masked_fill(padding, 0.0), second.masked_fill(padding, 0.0), real


def _units(vectors: Tensor) -> Tensor:
    norm = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(norm == 0, 1.0, norm)


def _missing(u: Tensor, v: Tensor) -> Tensor:
    """Return half of how many of the two unit vectors are 0, what their squared distance lacks to a cosine of 0."""
    return ((~u.any(-1)).to(u) + (~v.any(-1)).to(v)) / 2
