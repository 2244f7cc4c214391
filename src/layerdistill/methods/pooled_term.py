"""The loss between pooled hidden states, mapped to one small width on both sides (RAIL-KD)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from layerdistill.core.seeds import derive_seed
from layerdistill.core.types import Batch, LayerRef, Mean, Needs, Progress, Signal, StackName, Unit
from layerdistill.matching import LayerMap, Projections, direction_distance, mean_over_tokens
from layerdistill.methods.hidden_term import pair_name

Form = Literal["layerwise", "concatenated"]


class PooledTerm(nn.Module):
    """The distance between directions of mapped, token-averaged hidden states.

    `layerwise` has one map for each teacher layer that the layer map can name and one for each student layer, and is
    named `hidden/<student layer>-<teacher layer>`. `concatenated` lays the matched layers of each side end to end in
    the order of the layer map and has one map a side; it is named `hidden` (`hidden/encoder` and `hidden/decoder` where
    there are two stacks). A student layer matched with a group of teacher layers (map `average`) is compared with the
    mean of their mapped averages, or, concatenated, with the mean of their averages.
    """

    name = "hidden"

    def __init__(
        self,
        maps: Sequence[LayerMap],
        widths: Mapping[StackName, tuple[int, int]],
        weight: float,
        projection_size: int,
        form: Form = "layerwise",
        *,
        train_teacher_maps: bool = True,
        squared: bool = True,
        include_padding: bool = False,
        reduce: Literal["mean", "sum"] = "mean",
        seed: int = 0,
    ) -> None:
        """`widths` holds the student's and the teacher's width of each stack."""
        super().__init__()
        self.maps = list(maps)
        self.weight = weight
        self.form = form
        self.squared = squared
        self.include_padding = include_padding
        self.reduce = reduce
        self.student_maps, self.teacher_maps = nn.ModuleDict(), nn.ModuleDict()
        for layer_map in self.maps:
            stack = layer_map.stack
            student_width, teacher_width = widths[stack]
            shared = form == "concatenated"
            if shared:
                student_width *= len(layer_map.groups)
                teacher_width *= len(layer_map.groups)
            ours = [layer for layer, _ in layer_map.refs_at(0, 0)]
            self.student_maps[stack or "only"] = Projections(
                "linear", ours, student_width, projection_size, shared=shared, bias=True, seed=seed
            )
            # A frozen map without its bias, which starts at 0, is the trained one as it starts.
            self.teacher_maps[stack or "only"] = Projections(
                "linear" if train_teacher_maps else "frozen_random", teacher_layers(layer_map), teacher_width,
                projection_size, shared=shared, bias=train_teacher_maps, seed=derive_seed(seed, "teacher maps"),
            )  # fmt: skip

    @property
    def per_pair(self) -> bool:
        """Whether there is one loss for each pair of layers."""
        return self.form == "layerwise"

    def needs(self, progress: Progress) -> Needs:
        """The matched layers at this point of training; of the teacher's no more than their averages."""
        groups = [group for layer_map in self.maps for group in layer_map.refs_at(progress.epoch, progress.step)]
        theirs = frozenset(layer for _, teachers in groups for layer in teachers)
        return Needs(
            student=frozenset(student for student, _ in groups),
            teacher=theirs if self.include_padding else frozenset(),
            teacher_averages=frozenset() if self.include_padding else theirs,
            teacher_padding=self.include_padding,
        )

    def unit(self, name: str) -> Unit:
        """Examples: each is one vector."""
        return "example"

    def coefficient(self, name: str, progress: Progress) -> float:
        """The weight, divided by the number of means when they are averaged."""
        if self.reduce == "sum":
            return self.weight
        losses = sum(len(layer_map.groups) for layer_map in self.maps) if self.per_pair else len(self.maps)
        return self.weight / losses

    def forward(self, student: Signal, teacher: Signal | None, batch: Batch, progress: Progress) -> dict[str, Mean]:
        """Return one mean per matched student layer, or one per stack."""
        assert teacher is not None, "the trainer runs the teacher because needs() asks for its layers"
        means: dict[str, Mean] = {}
        for layer_map in self.maps:
            stack = layer_map.stack
            groups = layer_map.refs_at(progress.epoch, progress.step)
            mask = None if self.include_padding else student.masks[stack]
            ours = {layer: mean_over_tokens(student.hidden[layer], mask) for layer, _ in groups}
            targets = {layer for _, group in groups for layer in group}
            theirs = {
                layer: mean_over_tokens(teacher.hidden[layer].detach())
                if mask is None
                else teacher.averages[layer].detach()
                for layer in targets
            }
            if self.per_pair:
                means.update(self._pair_by_pair(stack, groups, ours, theirs))
            else:
                means["hidden" + f"/{stack}" * bool(stack)] = self._end_to_end(stack, groups, ours, theirs)
        return means

    def _pair_by_pair(
        self,
        stack: StackName,
        groups: Sequence[tuple[LayerRef, tuple[LayerRef, ...]]],
        ours: Mapping[LayerRef, Tensor],
        theirs: Mapping[LayerRef, Tensor],
    ) -> dict[str, Mean]:
        student_maps, teacher_maps = self.student_maps[stack or "only"], self.teacher_maps[stack or "only"]
        means = {}
        for layer, targets in groups:
            target = mean_of([teacher_maps(each, theirs[each]) for each in targets])
            mapped = student_maps(layer, ours[layer])
            means[pair_name(layer, targets)] = direction_distance(mapped, target, self.squared)
        return means

    def _end_to_end(
        self,
        stack: StackName,
        groups: Sequence[tuple[LayerRef, tuple[LayerRef, ...]]],
        ours: Mapping[LayerRef, Tensor],
        theirs: Mapping[LayerRef, Tensor],
    ) -> Mean:
        first, (target, *_) = groups[0]
        student = torch.cat([ours[layer] for layer, _ in groups], dim=-1)
        teacher = torch.cat([mean_of([theirs[each] for each in targets]) for _, targets in groups], dim=-1)
        return direction_distance(
            self.student_maps[stack or "only"](first, student),
            self.teacher_maps[stack or "only"](target, teacher),
            self.squared,
        )


def teacher_layers(layer_map: LayerMap) -> list[LayerRef]:
    """Return every teacher layer that a map can name, at any time of training.

    Only `in_order_random` reaches layers that its first draw may lack, and only if it is drawn anew; `random` permutes
    what it has.
    """
    named = {layer for _, group in layer_map.groups for layer in group}
    if layer_map.strategy == "in_order_random" and layer_map.redraw != "run":
        named |= set(range(1, layer_map.teacher_layers + 1))
    return [LayerRef(layer_map.stack, layer) for layer in sorted(named)]


def mean_of(vectors: Sequence[Tensor]) -> Tensor:
    """Return the mean of `(batch, features)` tensors (one tensor is returned as it is)."""
    return vectors[0] if len(vectors) == 1 else torch.stack(list(vectors)).mean(dim=0)
