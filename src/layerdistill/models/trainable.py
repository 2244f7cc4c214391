"""Which parameters train, put back as it was after something changed it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def trainable_again(model: nn.Module) -> Iterator[None]:
    """Give every parameter of `model` the `requires_grad` that it has now back when the block ends, however it ends."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
