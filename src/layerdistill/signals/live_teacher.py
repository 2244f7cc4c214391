"""The teacher as it is run on every batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from layerdistill.core.types import FINAL, Batch, Needs, Signal, TopK, TopTokens
from layerdistill.matching import likeliest_tokens, mean_over_tokens
from layerdistill.models import unwrap
from layerdistill.signals.laid_out import LaidOut
from layerdistill.signals.language_head import LanguageHead, language_head
from layerdistill.signals.source import run_model

ROWS = 512
"""Tokens whose logits are made at a time, where no more is read of them than the likeliest."""


class LiveTeacher:
    """A teacher that is run on every batch: frozen, without a graph, in eval mode unless `dropout` is wanted.

    With `padding_free` its blocks run on packed texts where that saves work, and what is said of padding is not read.
    """

    def __init__(self, model: nn.Module, dropout: bool = False, padding_free: bool = False) -> None:
        self.model = model.train(dropout).requires_grad_(False)
        self.padding_free = padding_free

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """Return the teacher's signal, in its own dtype; the head is run only if what it gives is asked for.

        The teacher follows the batch to its device, because nothing else moves it there.
        """
        place = batch["input_ids"].device
        if next(self.model.parameters()).device != place:
            self.model.to(place)
        by_head = bool(needs.teacher_top) and self.head is not None
        logits = needs.teacher_logits or bool(needs.teacher_top and not by_head)
        layers = needs.teacher | needs.teacher_averages | ({FINAL} if by_head else set())
        with torch.no_grad():
            packs = self.padding_free and not needs.teacher_padding
            found = run_model(self.model, batch, layers, logits, needs.teacher_taps, packs)
            averages = {
                layer: mean_over_tokens(found.hidden[layer], found.masks[layer.stack])
                for layer in needs.teacher_averages
            }
            top = {which: self._top(found, which) for which in needs.teacher_top}
        kept = found.logits if needs.teacher_logits else None
        if isinstance(found.hidden, LaidOut):
            laid_out = found.hidden.only(needs.teacher)
            return replace(found, logits=kept, hidden=laid_out, averages=averages, top=top, rows=laid_out.rows)
        hidden = {layer: state for layer, state in found.hidden.items() if layer in needs.teacher}
        return replace(found, logits=kept, hidden=hidden, averages=averages, top=top)

    @cached_property
    def head(self) -> LanguageHead | None:
        """What makes logits of the last states, a few tokens at a time; None where that is not known."""
        return language_head(self.model)

    @property
    def vocabulary(self) -> int:
        """The number of logits."""
        model: Any = unwrap(self.model)
        return model.config.get_text_config().vocab_size

    def _top(self, found: Signal, which: TopK) -> TopTokens:
        """Return the likeliest tokens of every real position."""
        mask = found.masks[""].bool()
        parts = [likeliest_tokens(logits, which) for logits in self._logits_of(found, mask)]
        ids = torch.zeros(*mask.shape, which.k, dtype=torch.long, device=mask.device)
        log_probabilities = torch.zeros(*mask.shape, which.k + 1, device=mask.device)
        if parts:
            ids[mask] = torch.cat([part.ids for part in parts])
            log_probabilities[mask] = torch.cat([part.log_probabilities for part in parts]).float()
        return blank_padding(TopTokens(ids, log_probabilities), which, mask, self.vocabulary)

    def _logits_of(self, found: Signal, mask: Tensor) -> Iterable[Tensor]:
        """Yield the logits of real tokens, some rows at a time."""
        if found.logits is not None:
            yield from found.logits[mask].split(ROWS)
        elif self.head is not None:
            for rows in found.hidden[FINAL][mask].split(ROWS):
                yield self.head(rows, FINAL)


def blank_padding(top: TopTokens, which: TopK, mask: Tensor, vocabulary: int) -> TopTokens:
    """Return likeliest tokens that say on padding, where `mask` is false, that all tokens are equally likely.

    Padding may have a label, as in data that were padded beforehand; a loss that is taken there must find a
    distribution.
    """
    width = which.vocab_size or vocabulary
    each, others = -math.log(width), math.log((width - which.k) / width)
    ids = torch.arange(which.k, device=top.ids.device)
    equal = torch.tensor([each] * which.k + [others], device=top.ids.device)
    padding = ~mask.unsqueeze(-1)
    return TopTokens(torch.where(padding, ids, top.ids), torch.where(padding, equal, top.log_probabilities))
