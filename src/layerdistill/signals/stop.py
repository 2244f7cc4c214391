"""A frozen model run no further than to the highest layer that is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from layerdistill.core.types import LayerRef
from layerdistill.models import find_stacks


class Reached(Exception):
    """The block above the highest wanted layer was about to be run."""


@contextmanager
def stopping_above(model: nn.Module, layers: Iterable[LayerRef]) -> Iterator[None]:
    """Let a forward pass of `model` inside the block end before the first block above all of `layers`.

    To be entered after `capture`, whose hooks then have run. Nothing is stopped in a model with an encoder and a
    decoder, or where `final` or the last block's output is wanted. The forward pass must be the block's last statement,
    without a graph: what it returns is lost.
    """
    stack = find_stacks(model).get("")
    numbers = [layer.number for layer in layers]
    if stack is None or not numbers or min(numbers) < 0 or max(numbers) >= stack.depth:
        yield
        return

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise Reached

    handle = stack.blocks[max(numbers)].register_forward_pre_hook(stop)
    try:
        yield
    except Reached:
        pass
    finally:
        handle.remove()
