"""The loss between the outputs of the two models' LoRA down-projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from layerdistill.core.types import Batch, LayerRef, Mean, Needs, Progress, Signal, StackName, Tap, Unit
from layerdistill.matching import LayerMap
from layerdistill.matching.adapters import Normalise, adapter_features, adapter_loss
from layerdistill.models.adapters import ADAPTER
from layerdistill.models.projections import BlockProjections

Blocks = Mapping[StackName, Sequence[BlockProjections]]


class AdapterTerm(nn.Module):
    """LoRAILD's distance per token between `A` outputs of matched blocks; named `hidden`, or `hidden/<stack>`.

    Layer k of a map means the projections of block k. The student's side is the output of its A, which sees LoRA's
    dropout while training; the teacher's is the input of its projection times its A, so that a teacher whose adapters
    are merged will do. A student block matched with several teacher blocks is compared with the mean of their outputs.
    Two stacks count half each. With `include_padding` the mean goes over all positions of each example, padding too.
    """

    name = "hidden"

    def __init__(
        self,
        maps: Sequence[LayerMap],
        student: Blocks,
        teacher: Blocks,
        teacher_adapters: Mapping[str, Tensor],
        weight: float,
        normalise: Normalise = "concatenation",
        include_padding: bool = False,
    ) -> None:
        """`student` and `teacher` hold the paths of each block's projections; the adapters are A by teacher path."""
        super().__init__()
        self.maps = list(maps)
        self.student = student
        self.teacher = teacher
        self.weight = weight
        self.normalise = normalise
        self.include_padding = include_padding
        self.number = {path: number for number, path in enumerate(teacher_adapters)}
        for path, matrix in teacher_adapters.items():
            # A clone, because a buffer moves with the student and the teacher may be used elsewhere.
            self.register_buffer(f"a{self.number[path]}", matrix.detach().clone(), persistent=False)

    def groups(self, layer_map: LayerMap, progress: Progress) -> list[tuple[BlockProjections, list[BlockProjections]]]:
        """Return the matched blocks' projections of one stack at this point of training."""
        return [
            (self._block(self.student, layer), [self._block(self.teacher, target) for target in targets])
            for layer, targets in layer_map.refs_at(progress.epoch, progress.step)
        ]

    def needs(self, progress: Progress) -> Needs:
        """The outputs of the student's A, and the inputs of the teacher's projections."""
        groups = [group for layer_map in self.maps for group in self.groups(layer_map, progress)]
        return Needs(
            student_taps=frozenset(student_tap(path) for block, _ in groups for path in block.values()),
            teacher_taps=frozenset(
                teacher_tap(path) for _, blocks in groups for block in blocks for path in block.values()
            ),
            teacher_padding=self.include_padding,
        )

    def unit(self, name: str) -> Unit:
        """Attended tokens of the stack, or examples if padding counts."""
        if self.include_padding:
            return "example"
        return "decoder_token" if name == "hidden/decoder" else "token"

    def coefficient(self, name: str, progress: Progress) -> float:
        """The weight, shared by the stacks."""
        return self.weight / len(self.maps)

    def forward(self, student: Signal, teacher: Signal | None, batch: Batch, progress: Progress) -> dict[str, Mean]:
        """Return one mean per stack."""
        assert teacher is not None, "the trainer runs the teacher because needs() asks for its taps"
        means = {}
        for layer_map in self.maps:
            mask = student.masks[layer_map.stack]
            kept = torch.ones_like(mask, dtype=torch.bool) if self.include_padding else mask.bool()
            ours, theirs = [], []
            for block, targets in self.groups(layer_map, progress):
                ours.append(torch.cat([student.taps[student_tap(path)][kept] for path in block.values()], dim=-1))
                theirs.append(torch.stack(list(self._outputs(targets, teacher, kept))).mean(dim=0))
            mean = adapter_loss(ours, theirs, normalise=self.normalise)
            if self.include_padding:
                examples, positions = mask.shape
                mean = Mean(mean.total / positions, mean.count.new_tensor(examples))
            means[f"{self.name}/{layer_map.stack}" if layer_map.stack else self.name] = mean
        return means

    def _outputs(self, blocks: Sequence[BlockProjections], teacher: Signal, kept: Tensor) -> Iterator[Tensor]:
        """Yield the teacher's A outputs `(tokens, projections * rank)` of each block."""
        for block in blocks:
            yield torch.cat(
                [
                    adapter_features(teacher.taps[teacher_tap(path)][kept], self.get_buffer(f"a{self.number[path]}"))
                    for path in block.values()
                ],
                dim=-1,
            )

    def _block(self, blocks: Blocks, layer: LayerRef) -> BlockProjections:
        return blocks[layer.stack][layer.number - 1]


def student_tap(path: str) -> Tap:
    """Return where a student's A output is."""
    return Tap(f"{path}.lora_A.{ADAPTER}", "output")


def teacher_tap(path: str) -> Tap:
    """Return where what enters a teacher's projection, and so its A, is."""
    return Tap(path, "input")
