"""Losses between the student's and the teacher's predictions, and between the student's and the hard labels.

Every divergence takes logits `(batch, classes)`, or `(batch, seq, vocab)` with a mask `(batch, seq)`, sums over the
last axis (`logit_mse` averages), averages over real rows, and is multiplied by the squared temperature, so that its
gradient keeps its size when the temperature changes (Hinton et al. 2015). No gradient reaches the teacher.

`vocab_size`, or the smaller last axis where the two differ, cuts both sides to their first entries before the softmax:
the ids that pad a vocabulary to a round number get no probability on either side. That assumes that equal ids mean
equal tokens, which the caller must know; only the sizes are looked at here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from layerdistill.core.errors import UserError
from layerdistill.core.types import Mean
from layerdistill.matching.rows import (
    in_full_precision,
    in_one_dtype,
    real_row_numbers,
    real_rows,
    same_rows,
    summed,
)
from layerdistill.matching.wide_rows import cross_entropy_of_rows, kl_of_rows

Divergence = Literal["forward_kl", "reverse_kl", "js_divergence", "soft_cross_entropy"]

LOWEST_LOG_PROBABILITY = -100.0
"""What `reverse_kl` reads where the teacher's logit is minus infinity; the true value would make the loss infinite."""


@in_full_precision
def forward_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Mean:
    """`T^2 KL(teacher || student)`: the student must cover whatever the teacher finds likely (Hinton et al. 2015).

    Shapes, mask and `vocab_size` as in the module's docstring; the count is in examples or tokens. Classes of which the
    teacher's logit is minus infinity add nothing. Raises UserError for one logit, of which a KL is always 0.
    """
    return _scaled(_kl(student, teacher, mask, temperature, vocab_size), temperature)


@in_full_precision
def reverse_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Mean:
    """`T^2 KL(student || teacher)`: the student seeks what the teacher finds most likely (MiniLLM, Gu et al. 2024).

    Arguments, count and errors as in `forward_kl`. A teacher's logit of minus infinity is read as a log-probability of
    -100, so that the student is pushed away from the class but the loss stays finite.
    """
    s, t = _logit_pairs(student, teacher, mask, temperature, vocab_size, categorical=True)
    with torch.no_grad():
        log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
        log_t = torch.where(log_t == -torch.inf, LOWEST_LOG_PROBABILITY, log_t)
        ratio = torch.where(log_s == -torch.inf, 0.0, log_s - log_t)
    # The ratio needs no gradient: its expected gradient under the student's own distribution is 0.
    return _scaled((s.softmax(-1) * ratio).sum(-1), temperature)


@in_full_precision
def js_divergence(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Mean:
    """`T^2` times the Jensen-Shannon divergence, `(KL(teacher || m) + KL(student || m)) / 2`, m their average; nats.

    Arguments, count and errors as in `forward_kl`. At most `T^2 log 2` per row, so it is robust where the two disagree.
    """
    s, t = _logit_pairs(student, teacher, mask, temperature, vocab_size, categorical=True)
    with torch.no_grad():
        log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
        neither = (log_s == -torch.inf) & (log_t == -torch.inf)
        # Beyond e^80 the rarer side adds less than any float shows; the bound keeps 0 x infinity away.
        gap = torch.where(neither, 0.0, log_t - log_s).clamp(-80, 80)
        student_ratio, teacher_ratio = _log_ratio_to_average(gap), _log_ratio_to_average(-gap)
        teacher_part = (log_t.exp() * teacher_ratio).sum(-1)
    # The ratios need no gradient: what the average of the two contributes to the gradient sums to 0.
    return _scaled((teacher_part + (s.softmax(-1) * student_ratio).sum(-1)) / 2, temperature)


@in_full_precision
def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Mean:
    """`T^2` times the cross-entropy of the student under the teacher's probabilities: `forward_kl` + teacher's entropy.

    Same gradient as `forward_kl`, but not 0 at equality. Arguments, count and errors as in `forward_kl`.
    """
    _, t = _logit_pairs(student, teacher, mask, temperature, vocab_size, categorical=True)
    log_t = t.log_softmax(-1)
    entropy = -(log_t.exp() * torch.where(log_t == -torch.inf, 0.0, log_t)).sum(-1)
    return _scaled(_kl(student, teacher, mask, temperature, vocab_size) + entropy, temperature)


@in_full_precision
def binary_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Mean:
    """`T^2` times the sum over classes of the KL between the teacher's and the student's Bernoulli; for multi-label.

    Arguments and count as in `forward_kl`; here one class is allowed. Each class is a two-way softmax over its logit
    and 0, which is the sigmoid.
    """
    s, t = _logit_pairs(student, teacher, mask, temperature, vocab_size, categorical=False)
    per_class = _kl_rows(torch.stack([s, torch.zeros_like(s)], -1), torch.stack([t, torch.zeros_like(t)], -1))
    return _scaled(per_class.sum(-1), temperature)


@in_full_precision
def logit_mse(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Mean:
    """Squared difference of the logits, averaged over the last axis; the distillation term of a regression head.

    Arguments and count as in `forward_kl`; one output is allowed. The temperature has no effect: `T^2` cancels the two
    divisions by it. It is accepted so that all divergences can be called alike.
    """
    s, t = _logit_pairs(student, teacher, mask, temperature, vocab_size, categorical=False)
    return _scaled((s - t).square().mean(-1), temperature)


@in_full_precision
def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Mean:
    """Cross-entropy with hard labels: `(batch, classes)` with `(batch,)`, or `(batch, seq, vocab)` with `(batch, seq)`.

    The count is in labels that are not `ignore_index`; rows that carry that label reach neither value nor gradient.
    Raises UserError when shapes do not fit, and for one class, of which the loss is always 0.
    """
    _refuse_one_logit(logits, "mean_squared_error for a regression head, binary_cross_entropy for a yes/no label")
    if labels.shape != logits.shape[:-1]:
        raise UserError(
            f"labels have shape {tuple(labels.shape)} but logits {tuple(logits.shape)}: labels must have the logits' "
            f"shape without its last axis, {tuple(logits.shape[:-1])}, one class number each."
        )
    flat = labels.reshape(-1).to(logits.device)
    rows = real_row_numbers(logits, labels != ignore_index)
    return summed(cross_entropy_of_rows(logits.reshape(-1, logits.shape[-1]), flat, rows))


@in_full_precision
def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Mean:
    """Multi-label cross-entropy with labels from 0 to 1, both `(batch, classes)`, averaged over classes.

    The count is in examples. Raises UserError when shapes do not fit.
    """
    rows = real_rows(logits, None)
    targets = _targets(labels, rows)
    return summed(functional.binary_cross_entropy_with_logits(rows, targets, reduction="none").mean(-1))


@in_full_precision
def mean_squared_error(logits: Tensor, labels: Tensor) -> Mean:
    """Regression loss: `(batch, outputs)` with labels of the same shape, or `(batch, 1)` with `(batch,)`.

    Averaged over outputs; the count is in examples. Raises UserError when shapes do not fit, instead of broadcasting
    them.
    """
    rows = real_rows(logits, None)
    return summed((rows - _targets(labels, rows)).square().mean(-1))


def next_token_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Return, for each position of `(batch, seq)`, the label of the next one, and `ignore_index` for the last.

    The labels are moved rather than the logits cut: a cut of `(batch, seq, vocab)` would be copied.
    """
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], ignore_index)], dim=1)


def _logit_pairs(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    temperature: float,
    vocab_size: int | None,
    *,
    categorical: bool,
) -> tuple[Tensor, Tensor]:
    """Return both sides' real rows, cut to the common vocabulary and divided by the temperature."""
    kept = _common_width(student, teacher, temperature, vocab_size, categorical=categorical)
    student, teacher = student[..., :kept], teacher.detach()[..., :kept]
    s, t = in_one_dtype(real_rows(student, mask), real_rows(teacher, mask))
    return s / temperature, t / temperature


def _kl(student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float, vocab_size: int | None) -> Tensor:
    """KL(teacher || student) of every real row, without copies of the logits; see `wide_rows`."""
    width = _common_width(student, teacher, temperature, vocab_size, categorical=True)
    rows = real_row_numbers(student, mask)
    flat_student, flat_teacher = (given.reshape(-1, given.shape[-1]) for given in (student, teacher.detach()))
    if torch.float64 in (student.dtype, teacher.dtype):
        flat_student, flat_teacher = flat_student.double(), flat_teacher.double()
    return kl_of_rows(flat_student, flat_teacher, rows, width, temperature)


def _common_width(
    student: Tensor, teacher: Tensor, temperature: float, vocab_size: int | None, *, categorical: bool
) -> int:
    """Return how many entries of the last axis are compared; raises UserError for what cannot be compared."""
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}, but must be greater than 0; 1 leaves the logits as they are.")
    same_rows(student, teacher)
    smaller = min(student.shape[-1], teacher.shape[-1])
    kept = smaller if vocab_size is None else vocab_size
    if not 1 <= kept <= smaller:
        raise UserError(
            f"vocab_size is {kept}, but must be from 1 to {smaller}: the student has {student.shape[-1]} logits "
            f"and the teacher {teacher.shape[-1]}."
        )
    if categorical:
        _refuse_one_logit(student[..., :kept], "logit_mse for a regression head, binary_kl for a yes/no label")
    return kept


def _refuse_one_logit(logits: Tensor, instead: str) -> None:
    if logits.shape[-1] == 1:
        raise UserError(
            f"the logits have shape {tuple(logits.shape)}: over one logit the softmax is always 1, so this loss would "
            f"be 0 whatever the model says. Use {instead}."
        )


def _kl_rows(s: Tensor, t: Tensor) -> Tensor:
    """KL(softmax(t) || softmax(s)) along the last axis; value and gradient are exactly 0 where s equals t.

    Written as a difference of log-normalisers, because the gradient of `logsumexp` is computed by the expression that
    makes the teacher's probabilities here; that of `log_softmax` leaves a rounding error.
    """
    s, t = s - s.detach().amax(-1, keepdim=True), t - t.amax(-1, keepdim=True)
    normaliser_s, normaliser_t = s.logsumexp(-1), t.logsumexp(-1)
    probabilities = (t - normaliser_t.unsqueeze(-1)).exp()
    difference = torch.where(t == -torch.inf, 0.0, t - s)
    return (probabilities * difference).sum(-1) + (normaliser_s - normaliser_t)


def _log_ratio_to_average(gap: Tensor) -> Tensor:
    """log(p / ((p + q) / 2)) from `gap` = log q - log p."""
    return -torch.log1p(torch.expm1(gap) / 2)


def _scaled(per_row: Tensor, temperature: float) -> Mean:
    return summed(per_row * temperature**2)


def _targets(labels: Tensor, rows: Tensor) -> Tensor:
    targets = labels.to(rows)
    if targets.dim() == 1 and rows.shape[1] == 1:
        targets = targets.unsqueeze(-1)
    if targets.shape != rows.shape:
        raise UserError(
            f"labels have shape {tuple(labels.shape)} but the logits {tuple(rows.shape)}: give one number per output, "
            "in the logits' shape ((batch,) will do for one output)."
        )
    return targets
