"""Student and objective as one module, so that a distributed wrapper sees every parameter that trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from layerdistill.core.types import Batch, Mean, Needs, Progress, Signal, Term
from layerdistill.matching.vocabulary_loss import VocabularyPart
from layerdistill.signals import student_signal
from layerdistill.train.fused_predictions import FusedPredictions, with_states


class Composite(nn.Module):
    """The student (None where only helpers train) with the terms of one stage and their helpers (projections, filters).

    Always called through the wrapper that accelerate puts around it. It exposes no `config`, so that the Trainer does
    not write training-time settings such as `use_cache` into the student's own configuration.
    """

    def __init__(
        self,
        student: nn.Module | None,
        terms: nn.ModuleList,
        fused: FusedPredictions | None = None,
        padding_free: bool = False,
    ) -> None:
        """`fused` computes the terms on predictions without logits of all tokens, at the steps when that can be.

        `padding_free` runs the student's blocks on packed texts where that saves work.
        """
        super().__init__()
        self.student: Any = student
        self.terms = terms
        self.fused = fused
        self.padding_free = padding_free

    def needs(self, progress: Progress) -> Needs:
        """Return what will be read at this point of training: states in place of logits where losses are fused."""
        needs, parts = needs_of(self.terms, progress), self._parts(progress)
        return needs if parts is None else with_states(needs, parts.values())

    def forward(self, batch: Batch, teacher: Signal | None, progress: Progress) -> dict[str, tuple[Tensor, Tensor]]:
        """Return `{name: (total, count)}` of every term on this batch, in float32."""
        signal, parts = Signal(None, {}, {}), self._parts(progress)
        if self.student is not None:
            needs = self.needs(progress)
            packs = self.padding_free and not needs.teacher_padding
            signal = student_signal(self.student, batch, needs.student, needs.student_taps, parts is None, packs)
        predictions: dict[str, Mean] = {}
        if self.fused is not None and parts:
            weights = {name: term_of(self.terms, name).coefficient(name, progress) for name in parts}
            predictions = self.fused.means(parts, weights, signal, teacher, batch)
        means: dict[str, Mean] = {}
        for term in self.terms:
            name = str(term.name)
            means.update({name: predictions[name]} if name in predictions else term(signal, teacher, batch, progress))
        return {name: (mean.total, mean.count) for name, mean in means.items()}

    def _parts(self, progress: Progress) -> dict[str, VocabularyPart] | None:
        return self.fused.parts(self.terms, progress) if self.fused is not None else None

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Turn on activation checkpointing in the student, non-reentrant so that captured states keep their graph."""
        settings = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        self.student.activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **options)

    def helper_state(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the helper modules, by name."""
        return self.terms.state_dict()


def needs_of(terms: Iterable[Any], progress: Progress) -> Needs:
    """Return everything that the terms will read at this point of training."""
    needs = Needs()
    for term in terms:
        needs = needs | term.needs(progress)
    return needs


def term_of(terms: Iterable[Any], name: str) -> Term:
    """Return the term that made the mean called `name`; terms and their means share the word before the slash."""
    return next(term for term in terms if term.name == name.partition("/")[0])
