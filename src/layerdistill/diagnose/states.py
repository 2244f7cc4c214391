"""The hidden states of teacher and student on the same batches, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from layerdistill.core.errors import LayerDistillError, UserError
from layerdistill.core.types import Batch, LayerRef, StackName
from layerdistill.models import Stack, evaluating, find_stacks, widths
from layerdistill.signals import run_model


class LeftOut(LayerDistillError):
    """A part of the diagnosis cannot be made of these models or data; the message says why, in a sentence."""


@dataclass(frozen=True)
class PairedStates:
    """Layers 0 to the last block of one stack, `(batch, seq, width)` each, and the mask `(batch, seq)`."""

    teacher: list[Tensor]
    student: list[Tensor]
    mask: Tensor


def shared_stacks(teacher: nn.Module, student: nn.Module) -> list[StackName]:
    """Return the stacks of blocks that both models have; raises UserError when there is none."""
    ours, theirs = find_stacks(student), find_stacks(teacher)
    shared = [name for name in theirs if name in ours]
    if not shared:
        raise UserError(
            f"The teacher's stacks of blocks are {list(theirs)} and the student's {list(ours)}: no layer of one can be "
            "compared with one of the other. Give models of the same kind."
        )
    return shared


def layers_of(model: nn.Module, stack: StackName) -> list[LayerRef]:
    """Return every layer of a stack: 0 (what enters the first block) to its depth."""
    found: Stack = find_stacks(model)[stack]
    return [LayerRef(stack, number) for number in range(found.depth + 1)]


def layer_states(model: nn.Module, batch: Batch, stack: StackName) -> tuple[list[Tensor], Tensor]:
    """Return all layers of a stack on one batch, in eval mode and without a graph, and the mask."""
    layers = layers_of(model, stack)
    with evaluating(model), torch.no_grad():
        signal = run_model(model, batch, layers, logits=False)
    return [signal.hidden[layer] for layer in layers], signal.masks[stack]


def paired_states(
    teacher: nn.Module, student: nn.Module, batches: Sequence[Batch], stack: StackName
) -> Iterator[PairedStates]:
    """Yield the states of both models batch by batch."""
    for batch in batches:
        theirs, mask = layer_states(teacher, batch, stack)
        ours, _ = layer_states(student, batch, stack)
        yield PairedStates(theirs, ours, mask)


def refuse_wider_student(teacher: nn.Module, student: nn.Module, stack: StackName) -> None:
    """Raise LeftOut for a student that is wider than the teacher: no rotation brings it into the teacher's space."""
    ours, theirs = widths(student)[stack], widths(teacher)[stack]
    if ours > theirs:
        raise LeftOut(
            f"the student's states are {ours} wide and the teacher's {theirs}: they can be rotated into a wider space, "
            "not into a narrower one"
        )


def refuse_more_than_free(needed_bytes: float, what: str, place: torch.device) -> None:
    """Raise LeftOut when more than half of the free memory would be taken: of the device, or of this machine."""
    free = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else psutil.virtual_memory().available
    if needed_bytes > free / 2:
        raise LeftOut(
            f"{what} would take {needed_bytes / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB are free here"
        )


def listed(values: Tensor) -> Any:
    """Return a tensor as nested lists for JSON: rounded to four digits, None for NaN."""
    return [listed(row) for row in values] if values.dim() else number(float(values))


def number(value: float) -> float | None:
    """Return a number rounded to four digits, or None for NaN and infinity, which JSON does not have."""
    return round(value, 4) if abs(value) < float("inf") else None
