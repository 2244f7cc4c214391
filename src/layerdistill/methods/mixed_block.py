"""A block and the one that takes its place, side by side while the second learns; and the terms that go with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from layerdistill.core.types import Batch, Mean, Needs, Progress, Signal, Tap, Unit
from layerdistill.matching import masked_mse


class MixedBlock(nn.Module):
    """`(1 - share) old(x) + share new(x)` in training; `new(x)` alone at share 1 and in eval mode.

    Both are run at share 0 as well, so that every parameter that trains has a gradient at every step, as a distributed
    wrapper expects. In eval mode the model is what it will be without the old block.
    """

    def __init__(self, old: nn.Module, new: nn.Module) -> None:
        super().__init__()
        self.old, self.new = old, new
        self.share = 0.0
        # Models read such words off their blocks, to choose the mask that a block gets.
        for name, value in vars(old).items():
            if isinstance(value, str) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return hidden states `(batch, seq, width)`, in a tuple where the old block returns one."""
        if self.share == 1.0 or not self.training:
            return self.new(*args, **kwargs)
        args, kwargs = without_cache(args, kwargs)
        old, new = self.old(*args, **kwargs), self.new(*args, **kwargs)
        if isinstance(old, tuple):
            return (torch.lerp(old[0], new[0], self.share), *new[1:])
        return torch.lerp(old, new, self.share)


class FittedBlock(MixedBlock):
    """`old(x)`, while `new(x)` is computed for a loss; the old block is in eval mode, so that the target is fixed."""

    def train(self, mode: bool = True) -> FittedBlock:
        """Set the mode of the new block only."""
        super().train(mode)
        self.old.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the old block returns."""
        args, kwargs = without_cache(args, kwargs)
        self.new(*args, **kwargs)
        return self.old(*args, **kwargs)


def without_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a block's arguments with None for a key-value cache, of whose layers two blocks cannot share one."""
    plain = tuple(None if isinstance(value, Cache) else value for value in args)
    return plain, {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}


class FitTerm(nn.Module):
    """The mean square of `new(x) - old(x)` divided by that of `old(x) - x`, over real tokens; named `fit`.

    1 is a block that hands its input on, 0 one that does what the old block does. The divisor is that of the batch.
    """

    name = "fit"

    def __init__(self, path: str) -> None:
        """`path` is where the `FittedBlock` lies in the student."""
        super().__init__()
        self.entering, self.wanted = Tap(f"{path}.old", "input"), Tap(f"{path}.old", "output")
        self.made = Tap(f"{path}.new", "output")

    def needs(self, progress: Progress) -> Needs:
        """What enters and leaves the two blocks."""
        return Needs(student_taps=frozenset({self.entering, self.wanted, self.made}))

    def unit(self, name: str) -> Unit:
        """Real tokens."""
        return "token"

    def coefficient(self, name: str, progress: Progress) -> float:
        """1: it is the only term."""
        return 1.0

    def forward(self, student: Signal, teacher: Signal | None, batch: Batch, progress: Progress) -> dict[str, Mean]:
        """Return `{"fit": share of the old block's change that is not reproduced}`."""
        entering: Tensor = student.taps[self.entering].detach()
        made, wanted = student.taps[self.made] - entering, student.taps[self.wanted] - entering
        return {self.name: masked_mse(made, wanted, student.masks[""], divide_by_teacher=True)}


class ReplacementSchedule(nn.Module):
    """A term without a loss: it sets the share of each mixed block to what it is at this step of training.

    `needs` is what the trainer asks before every forward pass, so that is where it happens. The share is a function of
    the step and the block alone, the same on all processes and after a resume.
    """

    name = "replacement"

    def __init__(self, blocks: Sequence[MixedBlock], share: Callable[[int, int], float]) -> None:
        """`share(step, place)` is what `blocks[place]` gets."""
        super().__init__()
        # In a tuple, so that they are not registered: the student's parameters are no helpers.
        self.mixed = (tuple(blocks),)
        self.share = share

    def needs(self, progress: Progress) -> Needs:
        """Nothing; sets the shares."""
        for place, block in enumerate(self.mixed[0]):
            block.share = self.share(progress.step, place)
        return Needs()

    def unit(self, name: str) -> Unit:
        """There is nothing to count."""
        return "batch"

    def coefficient(self, name: str, progress: Progress) -> float:
        """There is nothing to multiply."""
        return 0.0

    def forward(self, student: Signal, teacher: Signal | None, batch: Batch, progress: Progress) -> dict[str, Mean]:
        """Return no mean."""
        return {}
