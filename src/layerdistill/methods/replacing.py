"""Put compact blocks into a model, one after the other or side by side with the old ones, for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from layerdistill.core.seeds import random_for
from layerdistill.methods.mixed_block import FittedBlock, MixedBlock
from layerdistill.models import unwrap
from layerdistill.models.causality import causality_problem, padding_problem
from layerdistill.models.compact import (
    CompactShape,
    block_path,
    describe_compact,
    new_compact_block,
    put_compact_block,
)
from layerdistill.models.modeling_compact import CompactBlock, put_block

CompactInit = Literal["warmup", "paper", "zero_up"]


class Replacing:
    """A model whose blocks are being replaced, in place; blocks are counted from 0."""

    def __init__(self, model: nn.Module, shape: CompactShape, init: CompactInit, seed: int) -> None:
        self.model = unwrap(model)
        self.description = describe_compact(model, shape)
        self.init = init
        self.seed = seed

    def new_block(self, number: int) -> CompactBlock:
        """Return a new block for a place: Xavier-uniform projections, or with `up` = 0, so that it hands its input on.

        `warmup` begins with the second.
        """
        block = new_compact_block(self.model, self.description, number, self.seed)
        if self.init != "paper":
            nn.init.zeros_(block.up.weight)
        return block

    def put(self, number: int, block: nn.Module) -> None:
        """Put a compact block into its place for good; the configuration then says so."""
        self.description = put_compact_block(self.model, self.description, number, block)

    def mix(self, number: int, new: CompactBlock) -> MixedBlock:
        """Put a mixture of the old block, frozen, and a new one into a place, and return it."""
        old = self.block_at(number).requires_grad_(False)
        mixed = MixedBlock(old, new)
        put_block(self.model, self.description, number, mixed)
        return mixed

    def fit(self, number: int, new: CompactBlock) -> FittedBlock:
        """Let a new block run beside the old one, which the model goes on with; everything but it is frozen."""
        fitted = FittedBlock(self.block_at(number), new)
        put_block(self.model, self.description, number, fitted)
        self.model.requires_grad_(False)
        new.requires_grad_(True)
        return fitted

    def unmix(self, number: int) -> None:
        """Put the old block back alone."""
        put_block(self.model, self.description, number, self.block_at(number).old)

    def block_at(self, number: int) -> Any:
        """Return what is in a place now."""
        return self.model.get_submodule(self.path(number))

    def path(self, number: int) -> str:
        """Return the dotted path of a place in the model."""
        return block_path(self.model, self.description, number)

    def train_only(self, which: Literal["all", "new"]) -> None:
        """Let all parameters train, or those of compact blocks only; an old block beside a new one never does."""
        self.model.requires_grad_(which == "all")
        for module in self.model.modules():
            if isinstance(module, CompactBlock):
                module.requires_grad_(True)
        for module in self.model.modules():
            if isinstance(module, MixedBlock):
                module.old.requires_grad_(False)

    def faults(self, numbers: Sequence[int]) -> list[str]:
        """Return why a compact block lets a token see a later one, or padding, where the old block did not.

        One block of each kind that the model has is put in, tried on random tokens, and taken out again.
        """
        checks = [check for check in (causality_problem, padding_problem) if check(self.model) is None]
        config: Any = self.model.config.get_text_config()
        fields = self.description["per_layer"]
        kinds = {str([getattr(config, key)[number] for key in fields]): number for number in reversed(numbers)}
        for number in sorted(kinds.values()):
            block = new_compact_block(self.model, self.description, number, self.seed)
            old = put_block(self.model, self.description, number, block)
            try:
                found = [problem for check in checks if (problem := check(self.model)) is not None]
            finally:
                put_block(self.model, self.description, number, old)
            if found:
                return [
                    f"A compact block made of {type(old).__name__} in the place of block {number} cannot be used: "
                    f"{'; '.join(found)}. No training was done. Take a model of another architecture."
                ]
        return []


def bernoulli_share(start: float, slope: float, seed: int, step: int, place: int) -> float:
    """Return 1 with probability `min(1, slope * step + start)`, else 0, for one block at one step.

    A function of its arguments alone. Source: BERT-of-Theseus (https://arxiv.org/abs/2002.02925). Deviation: one draw
    per optimisation step, not per forward pass, so that micro-batches of a step share it.
    """
    drawn = random_for(seed, "iskd-replacement", step, place).random()
    return 1.0 if drawn < min(1.0, slope * step + start) else 0.0


def ramp_share(steps: int, step: int, place: int) -> float:
    """Return what a blend gives the new block at a step: from 0, in equal parts, to 1 at `steps`."""
    return min(1.0, step / steps)
