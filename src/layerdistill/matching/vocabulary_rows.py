"""Losses of a few rows of a language model's logits and their gradient, in buffers that are made once."""

from __future__ import annotations

import torch
from torch import Tensor

from layerdistill.core.types import TopTokens
from layerdistill.matching.logits import LOWEST_LOG_PROBABILITY, Divergence
from layerdistill.matching.top_k import divergence_of_outcomes

Difference = tuple[Tensor, Tensor]
"""A divergence of each row, `(n,)`, and its slope in the student's softened logits, `(n, width)`."""


class RowLosses:
    """Cross-entropy and divergence of a few rows at a time; `width` entries of each row are compared.

    `slope` is a buffer for the gradient of as many rows, `(most, vocab)`, as there are at most, and says in which dtype
    and where all logits are.
    """

    def __init__(
        self, divergence: Divergence, temperature: float, width: int, slope: Tensor, teacher_excludes: bool
    ) -> None:
        """`teacher_excludes` says that logits of the teacher may be minus infinity, as a bias can make them."""
        self.name = divergence
        self.temperature = temperature
        self.width = width
        self.difference = {
            "forward_kl": self._forward_kl,
            "reverse_kl": self._reverse_kl,
            "js_divergence": self._js_divergence,
            "soft_cross_entropy": self._soft_cross_entropy,
        }[divergence]
        self.slope = slope
        self.softened, self.ours, self.theirs = (slope.new_empty(len(slope), width) for _ in range(3))
        self.teacher_excludes = teacher_excludes

    def cross_entropy(self, logits: Tensor, labels: Tensor, slope: Tensor, weight: float) -> Tensor:
        """Return the cross-entropy, `(n,)`, and put its slope, times `weight`, in the place of `slope`."""
        torch.softmax(logits, -1, out=slope)
        labels = labels.unsqueeze(1)
        values = _log_normaliser(logits, slope) - logits.gather(1, labels).squeeze(1)
        slope.scatter_(1, labels, slope.gather(1, labels) - 1).mul_(weight)
        return values

    def divergence(self, logits: Tensor, teacher: Tensor, slope: Tensor, weight: float) -> Tensor:
        """Return `T^2` times the divergence, `(n,)`, and add its slope, times `weight`; `teacher` is overwritten."""
        softened = torch.div(logits[:, : self.width], self.temperature, out=self.softened[: len(logits)])
        ours = torch.softmax(softened, -1, out=self.ours[: len(logits)])
        theirs = torch.softmax(teacher.div_(self.temperature), -1, out=self.theirs[: len(logits)])
        values, direction = self.difference(softened, teacher, ours, theirs)
        slope[:, : self.width].add_(direction, alpha=weight * self.temperature)
        return values.mul_(self.temperature**2)

    def divergence_of_likeliest(self, logits: Tensor, teacher: TopTokens, slope: Tensor, weight: float) -> Tensor:
        """Return `T^2` times the divergence over a teacher's likeliest tokens, `(n,)`, and add its slope."""
        softened = torch.div(logits[:, : self.width], self.temperature, out=self.softened[: len(logits)])
        ours = torch.softmax(softened, -1, out=self.ours[: len(logits)])
        log_kept = softened.gather(1, teacher.ids) - _log_normaliser(softened, ours).unsqueeze(1)
        kept = ours.gather(1, teacher.ids)
        others = ours.scatter_(1, teacher.ids, 0.0)
        share = others.sum(-1, keepdim=True).clamp_(min=torch.finfo(ours.dtype).tiny)
        log_ours = torch.cat([log_kept, share.log()], 1)
        values, pull = divergence_of_outcomes(log_ours, teacher.log_probabilities.to(ours), self.name)
        whole = pull.sum(-1, keepdim=True)
        direction = others.mul_(pull[:, -1:] / share - whole)
        direction.scatter_(1, teacher.ids, pull[:, :-1] - whole * kept)
        slope[:, : self.width].add_(direction, alpha=weight * self.temperature)
        return values.mul_(self.temperature**2)

    # Each of these takes softened logits and probabilities of both sides, and may overwrite all four.

    def _forward_kl(self, s: Tensor, t: Tensor, p_s: Tensor, p_t: Tensor) -> Difference:
        normalisers = _log_normaliser(s, p_s) - _log_normaliser(t, p_t)
        gaps = t.sub_(s)
        if self.teacher_excludes:  # 0 times infinity is to be 0
            gaps.masked_fill_(p_t == 0, 0.0)
        return gaps.mul_(p_t).sum(-1) + normalisers, p_s.sub_(p_t)

    def _soft_cross_entropy(self, s: Tensor, t: Tensor, p_s: Tensor, p_t: Tensor) -> Difference:
        normalisers = _log_normaliser(s, p_s)
        return normalisers - s.mul_(p_t).sum(-1), p_s.sub_(p_t)

    def _reverse_kl(self, s: Tensor, t: Tensor, p_s: Tensor, p_t: Tensor) -> Difference:
        log_t = t.sub_(_log_normaliser(t, p_t).unsqueeze(1)).masked_fill_(t == -torch.inf, LOWEST_LOG_PROBABILITY)
        ratio = s.sub_(_log_normaliser(s, p_s).unsqueeze(1)).sub_(log_t).masked_fill_(p_s == 0, 0.0)
        values = torch.mul(p_s, ratio, out=log_t).sum(-1)
        return values, ratio.sub_(values.unsqueeze(1)).mul_(p_s)

    def _js_divergence(self, s: Tensor, t: Tensor, p_s: Tensor, p_t: Tensor) -> Difference:
        normalisers = _log_normaliser(s, p_s) - _log_normaliser(t, p_t)
        gap = t.sub_(s).add_(normalisers.unsqueeze(1))
        # Beyond e^80 the rarer side adds less than any float shows; neither side has a class that both exclude.
        gap.nan_to_num_(nan=0.0).clamp_(-80, 80)
        teacher_part = p_t.mul_(torch.neg(gap, out=s).expm1_().div_(2).log1p_()).sum(-1)
        ratio = gap.expm1_().div_(2).log1p_().neg_()
        student_part = torch.mul(p_s, ratio, out=s).sum(-1)
        direction = ratio.sub_(student_part.unsqueeze(1)).mul_(p_s).div_(2)
        return (student_part - teacher_part) / 2, direction


def cap_(logits: Tensor, cap: float | None) -> Tensor:
    """Bring logits softly, in place, into the range from `-cap` to `cap`; None leaves them as they are."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def through_cap_(slope: Tensor, capped: Tensor, cap: float | None) -> Tensor:
    """Put the slope in the logits before the cap into the place of the capped logits, and return that."""
    return capped.copy_(slope) if cap is None else capped.div_(cap).square_().neg_().add_(1).mul_(slope)


def _log_normaliser(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Return the logarithm of the sum of the exponentials, `(n,)`, of which the probabilities' largest is one over."""
    return logits.amax(-1) - probabilities.amax(-1).log()
