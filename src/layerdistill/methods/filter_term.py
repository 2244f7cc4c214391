"""TED's first stage: filters learn the task on top of a frozen model, each with a head of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerdistill.core.types import IGNORED_LABEL, Batch, LayerRef, Mean, Needs, Progress, Signal, StackName, Unit
from layerdistill.matching import next_token_labels
from layerdistill.matching.filters import Filters, start_normal
from layerdistill.matching.read_out import read_out_cross_entropy
from layerdistill.matching.task_loss import label_unit, task_loss
from layerdistill.signals.language_head import LanguageHead
from layerdistill.signals.recorded import Position


class FilterTerm(nn.Module):
    """The task's loss of what a head makes of each filtered layer, averaged over the filters; named `filters/<layer>`.

    Reads the frozen model as the stage's teacher. A subclass says what the head is.
    """

    name = "filters"

    def __init__(self, task: str, filters: Mapping[StackName, Filters]) -> None:
        super().__init__()
        self.task = task
        self.filters = nn.ModuleDict({stack or "only": module for stack, module in filters.items()})
        self.layers: list[LayerRef] = [layer for module in filters.values() for layer in module.layers]

    def needs(self, progress: Progress) -> Needs:
        """The filtered layers of the frozen model."""
        return Needs(teacher=frozenset(self.layers))

    def unit(self, name: str) -> Unit:
        """Labelled positions or examples."""
        return label_unit(self.task)

    def coefficient(self, name: str, progress: Progress) -> float:
        """One over the number of filters."""
        return 1 / len(self.layers)

    def forward(self, student: Signal, teacher: Signal | None, batch: Batch, progress: Progress) -> dict[str, Mean]:
        """Return one mean per filter."""
        assert teacher is not None, "the stage brings the frozen model as its teacher"
        means = {}
        for layer in self.layers:
            hidden = teacher.hidden[layer]
            with torch.autocast(hidden.device.type, enabled=False):
                means[f"{self.name}/{layer}"] = self.loss(layer, hidden, teacher.masks[layer.stack], batch)
        return means

    def filtered(self, layer: LayerRef, hidden: Tensor) -> Tensor:
        """Return what the layer's filter makes of its states."""
        return self.filters[layer.stack or "only"](layer, hidden)

    def loss(self, layer: LayerRef, hidden: Tensor, mask: Tensor, batch: Batch) -> Mean:
        """Return the task's loss of one filtered layer, `hidden` being `(batch, seq, hidden)`."""
        raise NotImplementedError


class ClassifierFilterTerm(FilterTerm):
    """One token of each example through the filter, Linear(size, size), GELU and Linear(size, classes).

    Source: the released code, where each filter has a pooler of token 0 and a classifier of its own. `positions` says
    whether the first or the last real token is read. Heads are thrown away after the stage.
    """

    def __init__(
        self,
        task: str,
        filters: Mapping[StackName, Filters],
        heads: Mapping[LayerRef, nn.Module],
        positions: Mapping[StackName, Position],
    ) -> None:
        super().__init__(task, filters)
        self.heads = nn.ModuleDict({head_name(layer): head for layer, head in heads.items()})
        self.positions = positions

    def loss(self, layer: LayerRef, hidden: Tensor, mask: Tensor, batch: Batch) -> Mean:
        """Return the loss of the examples' labels."""
        place = real_token(mask, self.positions[layer.stack])
        states = hidden[torch.arange(len(place), device=place.device), place]
        return task_loss(self.task, self.heads[head_name(layer)](self.filtered(layer, states)), batch)


class LanguageFilterTerm(FilterTerm):
    """Every labelled position through the filter and the model's own final norm and head, both frozen.

    No released code covers language models: this is the construction of the tuned lens (Belrose et al. 2023,
    https://arxiv.org/abs/2303.08112) with the next token as target. Logits are made filter by filter, a few rows at a
    time.
    """

    def __init__(self, task: str, filters: Mapping[StackName, Filters], head: LanguageHead) -> None:
        super().__init__(task, filters)
        self.head = head

    def loss(self, layer: LayerRef, hidden: Tensor, mask: Tensor, batch: Batch) -> Mean:
        """Return the loss of the next tokens."""
        labels = next_token_labels(batch["labels"])
        kept = labels != IGNORED_LABEL
        rows = self.filtered(layer, hidden[kept])
        return read_out_cross_entropy(
            rows, labels[kept], lambda states: self.head(states, layer), self.head.vocab_size, IGNORED_LABEL
        )


def make_heads(
    layers: Sequence[LayerRef], size: int, classes: int, dropout: tuple[float, float] = (0.0, 0.0)
) -> dict[LayerRef, nn.Module]:
    """Return a classifier for each layer, drawn from torch's generator; `dropout` comes before each of its matrices."""
    return {
        layer: nn.Sequential(
            nn.Dropout(dropout[0]),
            start_normal(nn.Linear(size, size)),
            nn.GELU(),
            nn.Dropout(dropout[1]),
            start_normal(nn.Linear(size, classes)),
        )
        for layer in layers
    }


def dropout_of(config: Any) -> tuple[float, float]:
    """Return the dropout of a model's pooler and classifier as its configuration names them, 0 where it does not."""
    names = ("classifier_dropout", "cls_dropout", "hidden_dropout_prob", "dropout")
    found = [getattr(config, name, None) for name in names]
    return float(getattr(config, "pooler_dropout", None) or 0), float(next((p for p in found if p is not None), 0))


def real_token(mask: Tensor, position: Position) -> Tensor:
    """Return where the first or the last real token of each row is, `(batch,)`, whichever side the padding is on."""
    real = mask.bool().long()
    return real.argmax(1) if position == "first" else mask.shape[1] - 1 - real.flip(1).argmax(1)


def head_name(layer: LayerRef) -> str:
    """Return a layer's name without the dot, which no module's name may hold."""
    return str(layer).replace(".", "_")
