"""Take tensors out of places inside a block: the input or output of any module, by its dotted path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerdistill.core.errors import UserError, did_you_mean
from layerdistill.core.types import StackName, Tap
from layerdistill.models import find_stacks


@contextmanager
def tapped(model: nn.Module, taps: Iterable[Tap]) -> Iterator[dict[Tap, Tensor]]:
    """Yield a dict that the model's forward pass fills with what flows through `taps`, with its graph.

    A module that is called several times in one pass keeps its first call (DeBERTa's projections are called on the
    tokens, then on relative positions); one that is called again by the backward pass (activation checkpointing) keeps
    what the forward pass gave. Raises UserError for a path that is no module.
    """
    found: dict[Tap, Tensor] = {}
    with ExitStack() as hooks:
        for tap in taps:
            module = module_at(model, tap.module)
            if tap.side == "input":
                hooks.callback(module.register_forward_pre_hook(partial(_keep_input, found, tap)).remove)
            else:
                hooks.callback(module.register_forward_hook(partial(_keep_output, found, tap)).remove)
        yield found


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module of `model` at a dotted path; raises UserError when there is none."""
    modules = dict(model.named_modules())
    if path not in modules:
        raise UserError(f"{type(model).__name__} has no module {path!r}.{did_you_mean(path, list(modules))}")
    return modules[path]


def stack_of(model: nn.Module, tap: Tap) -> StackName:
    """Return the stack of blocks that a tap lies in, `""` where a model has one."""
    stacks = find_stacks(model)
    return next((name for name, stack in stacks.items() if tap.module.startswith(stack.block_path + ".")), "")


def _keep_input(found: dict[Tap, Tensor], tap: Tap, module: nn.Module, args: tuple[Any, ...]) -> None:
    if torch._C._current_graph_task_id() == -1:
        found.setdefault(tap, args[0])


def _keep_output(found: dict[Tap, Tensor], tap: Tap, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if torch._C._current_graph_task_id() == -1:
        found.setdefault(tap, output[0] if isinstance(output, tuple | list) else output)
