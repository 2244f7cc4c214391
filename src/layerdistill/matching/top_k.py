"""The divergence of predictions over a teacher's k likeliest tokens and one outcome for all others together.

With all tokens but k thrown together KL can only be smaller than over all of them (the log sum inequality), and it is
equal where the two models agree on how likely the others are among themselves. Without that last outcome the k would
have to be made to add up to 1, which pulls the student towards a teacher that is surer than it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import Mean, TopK, TopTokens
from layerdistill.matching.logits import LOWEST_LOG_PROBABILITY, Divergence
from layerdistill.matching.rows import in_full_precision, summed, upcast
from layerdistill.matching.wide_rows import rows_at_once

GROUP = 32
"""Entries of a row of which the maximum is taken first."""

FEWER = 4
"""How many times fewer entries must be left for that to be worth its while."""


def likeliest_tokens(logits: Tensor, which: TopK) -> TopTokens:
    """Return the likeliest tokens of `(n, vocab)` logits; raises UserError if there are not more tokens than asked for.

    The probability of the others is a sum of theirs, not 1 less that of the likeliest, which would be rounding alone.
    That of a token whose logit is minus infinity is exp(LOWEST_LOG_PROBABILITY).
    """
    width = logits.shape[-1] if which.vocab_size is None else which.vocab_size
    if not 1 <= which.k < width:
        raise UserError(f"k is {which.k}, but must be from 1 to {width - 1}: there are {width} tokens in all.")
    pieces = logits[:, :width].split(rows_at_once(width, logits.device))
    found = [_likeliest(piece, which.k, which.temperature) for piece in pieces]
    ids, log_probabilities = (torch.cat(parts) for parts in zip(*found, strict=True))
    return TopTokens(ids, log_probabilities)


def _likeliest(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    wide = upcast(logits)
    ids = _largest(wide, k)
    softened = wide.div(temperature)  # a tensor of its own, changed in place below
    values = softened.gather(1, ids)
    softened.scatter_(1, ids, -torch.inf)
    peak = softened.amax(-1, keepdim=True).clamp_min_(torch.finfo(softened.dtype).min)
    others = softened.sub_(peak).exp_().sum(-1, keepdim=True).log_().add_(peak)
    found = torch.cat([values, others], 1)
    found -= found.logsumexp(-1, keepdim=True)
    return ids, found.masked_fill_(found == -torch.inf, LOWEST_LOG_PROBABILITY)


def _largest(rows: Tensor, k: int) -> Tensor:
    """Return where the k largest entries of each row are, largest first.

    On a processor `topk` reads a row far more slowly than `amax`: it is given the k groups with the largest maxima, in
    which they must be, and what is left over at the end of the row.
    """
    grouped = rows.shape[1] - rows.shape[1] % GROUP
    if rows.device.type != "cpu" or FEWER * k * GROUP > grouped:
        return rows.topk(k, -1).indices
    groups = rows[:, :grouped].unflatten(1, (-1, GROUP)).amax(-1).topk(k, -1).indices
    inside = (groups.unsqueeze(-1) * GROUP + torch.arange(GROUP)).flatten(1)
    rest = torch.arange(grouped, rows.shape[1]).expand(len(rows), -1)
    candidates = torch.cat([inside, rest], 1)
    return candidates.gather(1, rows.gather(1, candidates).topk(k, -1).indices)


@in_full_precision
def top_k_divergence(
    student: Tensor,
    teacher: TopTokens,
    mask: Tensor | None = None,
    *,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Mean:
    """Return `T^2` times the divergence of k + 1 outcomes, averaged over the positions that `mask` keeps.

    `student` are logits `(..., vocab)`, `teacher` what `likeliest_tokens` said of as many positions at the same
    temperature and `vocab_size`, `mask` `(...)`. The count is in positions.
    """
    rows, ids, theirs = (given.flatten(0, -2) for given in (student, teacher.ids, teacher.log_probabilities))
    if mask is not None:
        kept = mask.reshape(-1).ne(0).nonzero().squeeze(1)
        rows, ids, theirs = (given.index_select(0, kept) for given in (rows, ids, theirs))
    softened = upcast(rows[:, :vocab_size]) / temperature
    others = softened.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    ours = torch.cat([softened.gather(1, ids), others], 1) - softened.logsumexp(-1, keepdim=True)
    values, slope = divergence_of_outcomes(ours.detach(), theirs.to(ours), divergence)
    # The value is `values`; the second part is 0 and has the gradient. What is excluded has none.
    known = ours.masked_fill(ours == -torch.inf, 0.0)
    return summed((values + (slope * (known - known.detach())).sum(-1)) * temperature**2)


def divergence_of_outcomes(ours: Tensor, theirs: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Return the divergence `(n,)` of log-probabilities `(n, outcomes)`, and its slope in `ours`, to be centred.

    The slope is that for logits once `p_s` times its sum is taken away, as the softmax does.
    """
    p_s, p_t = ours.exp(), theirs.exp()
    # An outcome that one side excludes adds nothing on that side, whatever the other says.
    log_s, log_t = (side.masked_fill(side == -torch.inf, LOWEST_LOG_PROBABILITY) for side in (ours, theirs))
    if divergence == "forward_kl":
        return (p_t * (log_t - log_s)).sum(-1), -p_t
    if divergence == "soft_cross_entropy":
        return -(p_t * log_s).sum(-1), -p_t
    if divergence == "reverse_kl":
        slope = p_s * (log_s - log_t)
        return slope.sum(-1), slope
    middle = ((p_s + p_t) / 2).clamp(min=torch.finfo(p_s.dtype).tiny).log()
    slope = p_s * (log_s - middle) / 2
    return slope.sum(-1) + (p_t * (log_t - middle)).sum(-1) / 2, slope
