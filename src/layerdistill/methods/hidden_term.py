"""The loss between hidden states of matched layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerdistill.core.types import Batch, LayerRef, Mean, Needs, Progress, Signal, StackName, Unit
from layerdistill.matching import LayerMap, Projections
from layerdistill.matching.filters import Filters
from layerdistill.matching.projected import LinearMap
from layerdistill.matching.rows import upcast

Distance = Callable[[Tensor, Any, Tensor | None], Mean]
"""A function of the student's rows and the teacher's, `(tokens, hidden)`, and a mask `(tokens,)` or None: all count."""

ProjectedDistance = Callable[[Tensor, LinearMap, Any], Mean]
"""The same of all rows after a linear map of the student's, which is part of the computation."""


class HiddenTerm(nn.Module):
    """The distance between matched hidden states; named `hidden/<student layer>-<teacher layer>`.

    The means of the pairs are averaged (`reduce="mean"`) or summed (`reduce="sum"`), then multiplied by the weight. A
    student layer matched with a group of teacher layers (map `average`) is compared with the mean of their states, each
    after its filter where there are `teacher_filters`, which get no gradient.
    """

    name = "hidden"

    def __init__(
        self,
        maps: Sequence[LayerMap],
        distance: Distance,
        weight: float,
        projections: Mapping[StackName, Projections | Filters] | None = None,
        reduce: Literal["mean", "sum"] = "mean",
        whole_batch: bool = False,
        teacher_filters: Mapping[StackName, Filters] | None = None,
        padding: bool = False,
        sees_padding: bool = False,
        prepare: Callable[[Tensor], Any] | None = None,
        projected: ProjectedDistance | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`whole_batch` says that the distance is one number per batch (CKA), not a sum over tokens.

        `padding` says that padding is compared too, like any token; `sees_padding` that the distance is given padding
        together with the mask, and makes of it what it will. `prepare` makes of the teacher's rows what the distance
        takes in their place; it is called once for all student layers that are matched with the same teacher layers.
        `projected` is `distance` for rows that are all compared, together with a linear projection. `dtype` is that in
        which projections and distances multiply, as under autocast; None: what the training does.
        """
        super().__init__()
        self.maps = list(maps)
        self.distance = distance
        self.weight = weight
        self.projections = nn.ModuleDict({stack or "only": module for stack, module in (projections or {}).items()})
        filters = teacher_filters or {}
        self.teacher_filters = nn.ModuleDict({stack or "only": module for stack, module in filters.items()})
        self.reduce = reduce
        self.whole_batch = whole_batch
        self.padding = padding
        self.sees_padding = sees_padding
        self.prepare = prepare
        self.projected = projected
        self.dtype = dtype

    def groups(self, progress: Progress) -> list[tuple[LayerRef, tuple[LayerRef, ...]]]:
        """Return the matched layers at this point of training."""
        return [group for layer_map in self.maps for group in layer_map.refs_at(progress.epoch, progress.step)]

    def needs(self, progress: Progress) -> Needs:
        """The matched layers of both models."""
        groups = self.groups(progress)
        return Needs(
            student=frozenset(student for student, _ in groups),
            teacher=frozenset(layer for _, teachers in groups for layer in teachers),
            teacher_padding=self.padding or self.sees_padding,
        )

    def unit(self, name: str) -> Unit:
        """Attended tokens of the layer's stack, or whole batches."""
        if self.whole_batch:
            return "batch"
        return "decoder_token" if name.startswith("hidden/decoder.") else "token"

    def coefficient(self, name: str, progress: Progress) -> float:
        """The weight, divided by the number of pairs when they are averaged."""
        return self.weight / len(self.groups(progress)) if self.reduce == "mean" else self.weight

    def forward(self, student: Signal, teacher: Signal | None, batch: Batch, progress: Progress) -> dict[str, Mean]:
        """Return one mean per matched student layer."""
        assert teacher is not None, "the trainer runs the teacher because needs() asks for its layers"
        means: dict[str, Mean] = {}
        rows = {stack: self._rows(mask) for stack, mask in student.masks.items()}
        prepared: dict[tuple[LayerRef, ...], Any] = {}
        for layer, targets in self.groups(progress):
            chosen, mask = rows[layer.stack]
            ours = self._of(student, layer, chosen)
            with products_in(self.dtype, ours.device):
                if targets not in prepared:
                    prepared[targets] = self._teacher_side(teacher, layer.stack, targets, chosen)
                means[pair_name(layer, targets)] = self._distance(layer, ours, prepared[targets], mask)
        return means

    def _distance(self, layer: LayerRef, ours: Tensor, theirs: Any, mask: Tensor | None) -> Mean:
        if not self.projections:
            return self.distance(ours, theirs, mask)
        projections: Any = self.projections[layer.stack or "only"]
        if self.projected and projections.linear and mask is None:
            return projections(layer, ours, partial(_with_teacher, self.projected, theirs))
        return self.distance(projections(layer, ours), theirs, mask)

    def _rows(self, mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return which rows are compared (None: all), and the mask that the distance is given with them.

        Rows are chosen once for all pairs, because to count them a host waits for its accelerator; and before anything
        is computed from them, because padding's gradient of 0 times a NaN in its state would be NaN.
        """
        if self.sees_padding:
            return None, mask.reshape(-1)
        if self.padding:
            return None, None
        chosen = mask.reshape(-1).ne(0).nonzero().squeeze(1)
        return (None if chosen.shape[0] == mask.numel() else chosen), None

    def _of(self, signal: Signal, layer: LayerRef, chosen: Tensor | None) -> Tensor:
        """Return the rows `(tokens, hidden)` of a layer that are compared."""
        if layer in signal.rows and not (self.padding or self.sees_padding):
            return signal.rows[layer]
        return take_rows(signal.hidden[layer], chosen)

    def _teacher_side(
        self, teacher: Signal, stack: StackName, targets: tuple[LayerRef, ...], chosen: Tensor | None
    ) -> Any:
        theirs = [self._of(teacher, target, chosen) for target in targets]
        if self.teacher_filters:
            filters = self.teacher_filters[stack or "only"]
            with torch.no_grad():
                theirs = [filters(target, state) for target, state in zip(targets, theirs, strict=True)]
        averaged = average_states(theirs)
        return self.prepare(averaged) if self.prepare else averaged


def _with_teacher(projected: ProjectedDistance, theirs: Any, ours: Tensor, linear: LinearMap) -> Mean:
    return projected(ours, linear, theirs)


def products_in(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which autocast is on with a dtype, or one that changes nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def take_rows(states: Tensor, chosen: Tensor | None) -> Tensor:
    """Return the rows `(tokens, hidden)` of `(batch, seq, hidden)` with the numbers `chosen`, or all for None."""
    flat = states.reshape(-1, states.shape[-1])
    return flat if chosen is None else flat.index_select(0, chosen.to(flat.device))


def pair_name(student: LayerRef, teachers: Sequence[LayerRef]) -> str:
    """Return the name under which a pair is logged: `hidden/3-6`, `hidden/encoder.3-6`, `hidden/1-1..4`."""
    first, last = (str(layer).rpartition(".")[2] for layer in (teachers[0], teachers[-1]))
    theirs = first if len(teachers) == 1 else f"{first}..{last}"
    return f"hidden/{student}-{theirs}"


def average_states(states: Sequence[Tensor]) -> Tensor:
    """Return the mean of states of one shape in float32 at least (one state is returned as it is)."""
    if len(states) == 1:
        return states[0]
    return torch.stack([upcast(state) for state in states]).mean(dim=0)
