"""The losses on a causal language model's predictions from states and heads, in place of the logits of all tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from layerdistill.core.types import (
    FINAL,
    IGNORED_LABEL,
    Batch,
    Mean,
    Needs,
    Progress,
    Signal,
    TeacherSource,
    TopTokens,
)
from layerdistill.matching import next_token_labels
from layerdistill.matching.vocabulary_loss import VocabularyPart, vocabulary_losses
from layerdistill.signals.language_head import LanguageHead, language_head


class FusedPredictions:
    """The heads of a student and (where it is known) its teacher, and the losses that are computed through both."""

    def __init__(self, student: LanguageHead, teacher: LanguageHead | None) -> None:
        self.student = student
        self.teacher = teacher

    def parts(self, terms: Iterable[Any], progress: Progress) -> dict[str, VocabularyPart] | None:
        """Return, by the terms' names, what they make of logits now; None where one has to see the logits themselves.

        A term says it with a method `vocabulary_part`; one without that reads logits if its needs say so.
        """
        parts: dict[str, VocabularyPart] = {}
        for term in terms:
            said = getattr(term, "vocabulary_part", None)
            part = said(progress) if said is not None else None
            if part is not None:
                parts[term.name] = part
            elif (needs := term.needs(progress)).student_logits or needs.teacher_logits:
                return None
        kinds = [part.kind for part in parts.values()]
        known = self.teacher is not None or not any(reads_states(part) for part in parts.values())
        return parts if known and len(set(kinds)) == len(kinds) else None

    def means(
        self,
        parts: Mapping[str, VocabularyPart],
        weights: Mapping[str, float],
        student: Signal,
        teacher: Signal | None,
        batch: Batch,
    ) -> dict[str, Mean]:
        """Return the mean of every part, by its name; `weights` are the terms' coefficients."""
        states = student.hidden[FINAL]
        labels = next_token_labels(batch["labels"]).flatten()
        kept = (labels != IGNORED_LABEL).nonzero().squeeze(1)
        name_of = {part.kind: name for name, part in parts.items()}
        head = self.student.matrices(states.device)
        part = parts[name_of["logits"]] if "logits" in name_of else VocabularyPart("logits")
        teacher_rows = teacher_head = top = None
        if part.top is not None:
            assert teacher is not None, "the trainer runs the teacher because needs() asks for its likeliest tokens"
            said = teacher.top[part.top]
            top = TopTokens(*(each.flatten(0, 1).index_select(0, kept) for each in (said.ids, said.log_probabilities)))
        elif "logits" in name_of:
            assert teacher is not None and self.teacher is not None, "parts() says so"
            theirs = teacher.hidden[FINAL]
            teacher_rows = theirs.flatten(0, 1).index_select(0, kept)
            teacher_head = self.teacher.matrices(theirs.device)
        assert head is not None, "a head that is no matrix is not fused"
        task, logits = vocabulary_losses(
            states.flatten(0, 1).index_select(0, kept),
            head,
            labels.index_select(0, kept),
            teacher_rows,
            teacher_head,
            top,
            task_weight=weights[name_of["task"]] if "task" in name_of else None,
            logits_weight=weights[name_of["logits"]] if "logits" in name_of else 0.0,
            divergence=part.divergence,
            temperature=part.temperature,
            vocab_size=part.vocab_size,
        )
        made = {"task": task, "logits": logits}
        return {name: mean for kind, name in name_of.items() if (mean := made[kind]) is not None}


def with_states(needs: Needs, parts: Iterable[VocabularyPart]) -> Needs:
    """Return `needs` with what enters the heads in place of the logits that `parts` are computed of."""
    found = list(parts)
    return replace(
        needs,
        student=needs.student | ({FINAL} if found else set()),
        teacher=needs.teacher | ({FINAL} if any(reads_states(part) for part in found) else set()),
        teacher_logits=False,
        student_logits=False,
    )


def reads_states(part: VocabularyPart) -> bool:
    """Return whether a part is computed through the teacher's head, from its states."""
    return part.kind == "logits" and part.top is None


def fused_predictions(student: nn.Module | None, teacher: TeacherSource | None, task: str) -> FusedPredictions | None:
    """Return what computes predictions' losses without logits of all tokens; None where logits have to be made.

    That is for other tasks than causal-lm, and for a student that is wrapped, whose head is not known, or that has no
    final norm: what its last block gives might be changed in training before it enters the head.
    """
    ours = known_head(student) if task == "causal-lm" else None
    if ours is None or ours.norm is None:
        return None
    return FusedPredictions(ours, known_head(getattr(teacher, "model", None)))


def known_head(model: nn.Module | None) -> LanguageHead | None:
    """Return the head of a language model that nothing is wrapped around, None where it is not one known matrix."""
    head = language_head(model) if model is not None else None
    if head is None or head.matrices(next(head.head.parameters()).device) is None:
        return None
    return head
