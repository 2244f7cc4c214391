"""`training.torch_compile`: the student's blocks compiled one by one, the hooks and the losses left as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from transformers import TrainingArguments

from layerdistill.core.errors import UserError
from layerdistill.core.types import Needs
from layerdistill.models import find_stacks


@contextmanager
def compiled_blocks(student: nn.Module | None, args: TrainingArguments, needs: Needs) -> Iterator[None]:
    """Run the student's blocks through `torch.compile` inside the block, if `args` ask for it.

    Deviation from transformers, which compiles the whole module: hooks that read hidden states, and losses that hold
    data of their own, cannot be traced. A block's own `forward` can, with its hooks around it; blocks of one class
    share what is compiled. The backend and mode are those of `args`. Raises UserError for a method that reads inside
    blocks.
    """
    if not args.torch_compile or student is None:
        yield
        return
    if needs.student_taps:
        raise UserError(
            "training.torch_compile is true, but this method reads the inputs or outputs of modules inside the "
            "student's blocks, which a compiled block does not let out. Leave torch_compile out."
        )
    blocks = [block for stack in find_stacks(student).values() for block in stack.blocks]
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = torch.compile(  # type: ignore[method-assign]
                block.forward, backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode
            )
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward  # type: ignore[method-assign]


def no_compiler() -> TorchDynamoPlugin:
    """Return what tells accelerate not to compile the module that the Trainer sees."""
    return TorchDynamoPlugin(backend="no")  # type: ignore[arg-type]
