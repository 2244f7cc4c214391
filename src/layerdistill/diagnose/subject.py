"""What is diagnosed: a teacher, the student at its start and perhaps after training, and the rows they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from layerdistill.core.types import Batch, StackName
from layerdistill.diagnose.states import shared_stacks


@dataclass(frozen=True)
class Subject:
    """The models and the batches; `students` holds `start`, and `trained` for a finished run.

    `classes` is 0 where the task has no single class per example. `flat_batches` are the same rows padded to one
    length, for flattened features; None for features pooled over tokens.
    """

    teacher: nn.Module
    students: Mapping[str, nn.Module]
    task: str
    classes: int
    batches: Sequence[Batch]
    flat_batches: Sequence[Batch] | None = None

    @property
    def models(self) -> dict[str, nn.Module]:
        """Teacher and students by name."""
        return {"teacher": self.teacher, **self.students}

    def views(self) -> list[View]:
        """Return every student with every stack that it shares with the teacher."""
        return [
            View(name, student, stack)
            for name, student in self.students.items()
            for stack in shared_stacks(self.teacher, student)
        ]

    def stacks(self) -> dict[StackName, list[View]]:
        """Return the views of each stack."""
        found: dict[StackName, list[View]] = {}
        for view in self.views():
            found.setdefault(view.stack, []).append(view)
        return found


@dataclass(frozen=True)
class View:
    """One state of the student (`start` or `trained`), in one stack of blocks."""

    name: str
    student: nn.Module = field(repr=False)
    stack: StackName = ""

    @property
    def label(self) -> str:
        """`start`, or `start, decoder` in a model of two stacks."""
        return f"{self.name}, {self.stack}" if self.stack else self.name


def file_name(what: str, stack: StackName) -> str:
    """Return the name of a figure: `angles.png`, or `angles-decoder.png` in a model of two stacks."""
    return f"{what}-{stack}.png" if stack else f"{what}.png"


def in_stack(title: str, stack: StackName) -> str:
    """Return a title that says which stack it is about, where there are two."""
    return f"{title} ({stack})" if stack else title
