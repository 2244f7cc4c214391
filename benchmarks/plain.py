"""The terms of the objective as one writes them by hand: the reference for cost and for values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.works import Batch, Work


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Temperature squared times KL(teacher || student), averaged over rows `(rows, classes)`."""
    ours = functional.log_softmax(student / temperature, dim=-1)
    theirs = functional.softmax(teacher / temperature, dim=-1)
    return functional.kl_div(ours, theirs, reduction="batchmean") * temperature**2


def logits_term(work: Work, student: Tensor, teacher: Tensor) -> Tensor:
    """The KL of a batch; in a language model at the positions that predict a token."""
    if work.family == "gpt2":
        student, teacher = (logits[:, :-1].flatten(0, 1) for logits in (student, teacher))
    return kl(student, teacher, work.temperature)


def mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference over the hidden axis and real tokens of `(batch, seq, hidden)`."""
    per_token = (student - teacher).square().mean(-1)
    return (per_token * mask).sum() / mask.sum()


def cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """One minus the cosine, averaged over real tokens."""
    per_token = 1 - functional.cosine_similarity(student, teacher, dim=-1)
    return (per_token * mask).sum() / mask.sum()


def cka(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """One minus linear CKA over the batch's real tokens (Kornblith et al. 2019), gradients by autograd."""
    kept = mask.bool()
    x, y = student[kept], teacher[kept]
    x, y = x - x.mean(0), y - y.mean(0)
    return 1 - (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"mse": mse, "cosine": cosine, "cka": cka}


def hidden_term(
    work: Work, student: Sequence[Tensor], teacher: Sequence[Tensor], projections: nn.ModuleList, mask: Tensor
) -> Tensor:
    """The mean over pairs of the hidden distance; both sequences are a model's `hidden_states`."""
    found = []
    for number, (ours, theirs) in enumerate(work.pairs):
        state = projections[number](student[ours]) if len(projections) else student[ours]
        found.append(DISTANCES[work.hidden](state, teacher[theirs], mask))
    return torch.stack(found).mean()


def objective(work: Work, student: Any, teacher: Any, projections: nn.ModuleList, batch: Batch) -> dict[str, Tensor]:
    """The terms of a batch by name, from two outputs of transformers models; their sum is trained on."""
    terms = {"task": student.loss, "logits": logits_term(work, student.logits, teacher.logits)}
    if work.hidden != "none":
        mask = batch["attention_mask"]
        terms["hidden"] = hidden_term(work, student.hidden_states, teacher.hidden_states, projections, mask)
    return terms
