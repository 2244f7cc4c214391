"""Repair of a student that lost blocks: where the holes are, what trains, and what it learns from the whole teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from layerdistill.core.config import SectionConfig
from layerdistill.core.errors import UserError
from layerdistill.core.types import Batch, Mean, Needs, Pair, Progress, Signal, Unit
from layerdistill.matching import LayerMap, forward_kl, layer_map, masked_mse
from layerdistill.methods.hidden_term import HiddenTerm
from layerdistill.methods.logits_term import LogitsTerm
from layerdistill.methods.task_term import TaskTerm
from layerdistill.methods.weights import HiddenWeights
from layerdistill.models import find_stacks
from layerdistill.models.trainable import trainable_again

PAPER_DIVISOR = 100.0
"""What the released code divides the summed KL by."""

DEFAULT_TEMPERATURE = 2.0
"""Of `loss: normalised`; `loss: paper` has 1."""


class RepairConfig(SectionConfig):
    """What trains after blocks were removed."""

    scope: Literal["neighbours", "all", "none"] = "neighbours"
    """neighbours: the blocks next to each hole; all: the whole student; none: nothing, no training at all."""

    radius: PositiveInt = 1
    """Blocks on each side of a hole that train; scope neighbours only."""


class RepairWeights(HiddenWeights):
    """Coefficients of the repair's terms; the labels are not used unless asked for."""

    task: float = Field(0.0, ge=0)
    """Multiplies the loss on the labels."""


def hole_positions(removed: Sequence[int]) -> list[int]:
    """Return where the holes are in the new numbering, once per run of removed blocks.

    A position counts the blocks left below the hole: p lies between the new blocks p - 1 and p.
    """
    return sorted({block - sum(other < block for other in removed) for block in removed})


def matched_layers(position: int, kept: Sequence[int], teacher_depth: int) -> tuple[int, int]:
    """Return the student layer and the teacher layer that are compared at a hole.

    Layers are numbered as in `hidden_states`; `kept[k]` is the teacher's block that student block k (from 0) was. The
    student's layer p enters the block above the hole, which was block kept[p] of the teacher and got the teacher's
    layer kept[p] there: so the block below the hole learns to give what the last block removed used to give
    (Kovalev and Tikhomirov 2025, released code). They do not say what is done at the ends. Here, with nothing above the
    hole the target is the teacher's last layer, before the final norm; with nothing below it, the first block left
    learns to give what it gave in the teacher, because what enters it is the embedding output in both.
    """
    if position == 0:
        return 1, kept[0] + 1
    return position, kept[position] if position < len(kept) else teacher_depth


def neighbours(positions: Sequence[int], depth: int, radius: int) -> list[int]:
    """Return the numbers of the blocks within `radius` of a hole, on both sides."""
    around = {block for position in positions for block in range(position - radius, position + radius)}
    return sorted(around & set(range(depth)))


def repair_map(positions: Sequence[int], kept: Sequence[int], teacher_depth: int) -> LayerMap:
    """Return the matched layers of a repair: one pair per hole, and what both models give after their final norm.

    A block between two holes is matched for the one above it.
    """
    pairs: dict[int | str, int | str] = dict(matched_layers(at, kept, teacher_depth) for at in sorted(positions))
    return layer_map([*pairs.items(), ("final", "final")], student_layers=len(kept), teacher_layers=teacher_depth)


def repair_terms(
    pair: Pair,
    weights: RepairWeights,
    matched: LayerMap,
    loss: Literal["normalised", "paper"],
    temperature: float | None,
    count_padding: bool,
) -> nn.ModuleList:
    """Return the terms of one repair whose weight is not 0; the pairs' losses are added up, not averaged."""
    terms: list[nn.Module] = []
    if weights.task:
        terms.append(TaskTerm(pair.task, weights.task))
    if weights.logits and loss == "paper":
        terms.append(SummedKl(weights.logits, pair.vocab_size, count_padding))
    elif weights.logits:
        terms.append(LogitsTerm(pair.task, weights.logits, None, temperature or DEFAULT_TEMPERATURE, pair.vocab_size))
    if weights.hidden and loss == "paper":
        terms.append(
            HiddenTerm([matched], mse_of_batch, weights.hidden, reduce="sum", whole_batch=True, padding=count_padding)
        )
    elif weights.hidden:
        distance = partial(masked_mse, divide_by_teacher=True)
        terms.append(HiddenTerm([matched], distance, weights.hidden, reduce="sum"))
    return nn.ModuleList(terms)


class SummedKl(nn.Module):
    """KL(teacher || student) at temperature 1, summed over the tokens of a micro-batch and divided by 100.

    That is a weight of 0.01 x tokens of the micro-batch on the mean over tokens (40.96 for 2 x 2048). Micro-batches are
    averaged. All attended positions count, labelled or not, and padding too with `count_padding`, as in the released
    code; of a classifier, examples. Named `logits`.
    """

    name = "logits"

    def __init__(self, weight: float, vocab_size: int | None, count_padding: bool) -> None:
        super().__init__()
        self.weight = weight
        self.vocab_size = vocab_size
        self.count_padding = count_padding

    def needs(self, progress: Progress) -> Needs:
        """The teacher's logits."""
        return Needs(teacher_logits=True, teacher_padding=self.count_padding)

    def unit(self, name: str) -> Unit:
        """Micro-batches."""
        return "batch"

    def coefficient(self, name: str, progress: Progress) -> float:
        """The weight, at all times."""
        return self.weight

    def forward(self, student: Signal, teacher: Signal | None, batch: Batch, progress: Progress) -> dict[str, Mean]:
        """Return `{"logits": summed KL / 100}`."""
        assert student.logits is not None and teacher is not None and teacher.logits is not None
        mask = student.masks[""] if student.logits.dim() == 3 and not self.count_padding else None
        total = forward_kl(student.logits, teacher.logits, mask, vocab_size=self.vocab_size).total
        return {self.name: Mean(total / PAPER_DIVISOR, total.new_ones(()))}


def mse_of_batch(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Mean:
    """Return the squared difference averaged over a micro-batch's tokens and the hidden axis, as one number of it."""
    value = masked_mse(student, teacher, mask).value
    return Mean(value, value.new_ones(()))


@contextmanager
def only_training(model: nn.Module, blocks: Sequence[int] | None) -> Iterator[None]:
    """Let only the numbered blocks (0-based) of a model with one stack train, or everything for None, for a while.

    Membership decides, never a name's beginning. Raises UserError where a block shares its parameters with something
    that is not to train.
    """
    modules = [find_stacks(model)[""].blocks[block] for block in blocks] if blocks is not None else [model]
    trained, everywhere = occurrences(modules), occurrences([model])
    if any(everywhere[parameter] > times for parameter, times in trained.items()):
        raise UserError(
            f"{type(model).__name__} shares parameters of its blocks with other modules, so blocks cannot be trained "
            "alone. Write repair: {scope: all}."
        )
    with trainable_again(model):
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        yield


def occurrences(modules: Sequence[nn.Module]) -> Counter[int]:
    """Return in how many places of the modules each parameter stands, by its id."""
    return Counter(id(value) for module in modules for _, value in module.named_parameters(remove_duplicate=False))
