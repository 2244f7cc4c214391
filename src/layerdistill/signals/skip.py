"""Run a loaded model without some of its blocks, without copying it: as the stock model that lacks them would run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.core.types import StackName
from layerdistill.models import Stack, find_stacks, unwrap

_RETURNED: WeakKeyDictionary[type, int] = WeakKeyDictionary()
"""Class of block -> length of the tuple that it returns, 0 for a bare tensor; learned from one call."""


@contextmanager
def skipped(model: nn.Module, blocks: Iterable[int], stack: StackName = "") -> Iterator[None]:
    """Let `model` run without the numbered blocks (0-based) of one stack: each hands its input on.

    The model then computes what a stock model built without them does (`remove_blocks`), also where its class treats
    the first block specially (DeBERTa-v2's convolution, ModernBERT's missing norm). Parameters, names and hooks stay;
    captured layers are numbered as without the context, except in a DeBERTa-v2 with a convolution whose first block is
    skipped (there the blocks left come first). The cache for generation is off inside. All is put back afterwards,
    also after an exception.
    Raises UserError for a block that is not there, for all blocks at once, and for blocks that hand more to each other
    than hidden states (T5's relative positions).
    """
    inner = unwrap(model)
    found = _stack(inner, stack)
    skip = sorted(set(blocks))
    if any(not 0 <= block < found.depth for block in skip) or len(skip) >= found.depth:
        raise UserError(
            f"blocks to skip are {skip}, but must be numbers from 0 to {found.depth - 1} and leave at least one of the "
            f"{found.depth} blocks."
        )
    if skip and getattr(inner.config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(
            f"{type(inner).__name__} scales its attention by the number of the block (scale_attn_by_inverse_layer_idx),"
            " so a block cannot be skipped without changing those above it."
        )
    with ExitStack() as undo:
        _without_cache(inner, undo)
        if 0 in skip:
            _move_first(inner, found, skip, undo)
        for block in skip:
            _pass_through(found.blocks[block], undo)
        yield


def _stack(model: PreTrainedModel, name: StackName) -> Stack:
    stacks = find_stacks(model)
    if name not in stacks:
        raise UserError(
            f"stack is {name!r}, but {type(model).__name__} has {' and '.join(map(repr, stacks))}. Name one of them."
        )
    return stacks[name]


def _without_cache(model: PreTrainedModel, undo: ExitStack) -> None:
    """A skipped block writes nothing into a cache, so there is none."""
    holders = [model.config, model.config.get_text_config(), getattr(model, "generation_config", None)]
    for holder in holders:
        if holder is not None and getattr(holder, "use_cache", None):
            _set_for_now(holder, "use_cache", False, undo)


def _move_first(model: PreTrainedModel, stack: Stack, skip: list[int], undo: ExitStack) -> None:
    """Make the first block that is left what its class makes of a first block."""
    kept = [number for number in range(stack.depth) if number not in skip]
    if getattr(model.get_submodule(stack.block_path.rpartition(".")[0]), "conv", None) is not None:
        # DeBERTa-v2's convolution follows whatever block is the first in the list.
        listed: Any = model.get_submodule(stack.block_path)
        _order(listed, [stack.blocks[number] for number in (*kept, *skip)])
        undo.callback(_order, listed, list(stack.blocks))
    first, new = dict(stack.blocks[0].named_modules()), stack.blocks[kept[0]]
    for path, module in list(new.named_modules()):
        # ModernBERT's first block has no norm before its attention.
        if path and isinstance(first.get(path), nn.Identity) and not isinstance(module, nn.Identity):
            parent = new.get_submodule(path.rpartition(".")[0])
            _set_for_now(parent, path.rpartition(".")[2], first[path], undo)


def _order(listed: nn.ModuleList, blocks: list[nn.Module]) -> None:
    for number, block in enumerate(blocks):
        listed[number] = block


def _pass_through(block: nn.Module, undo: ExitStack) -> None:
    """Replace what calling a block does, so that its attributes, which some models read, stay where they are."""
    own: Callable[..., Any] = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if type(block) not in _RETURNED:
            _RETURNED[type(block)] = _length_returned(own, args, kwargs)
        length = _RETURNED[type(block)]
        return (hidden, *[None] * (length - 1)) if length else hidden

    _set_for_now(block, "forward", forward, undo)


def _length_returned(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    with torch.no_grad(), torch.random.fork_rng():
        output = own(*args, **kwargs)
    if isinstance(output, Tensor):
        return 0
    if any(isinstance(value, Tensor) for value in output[1:]) and not kwargs.get("output_attentions"):
        raise UserError(
            "The blocks of this architecture hand more than hidden states to the next one (relative positions, for "
            "instance), so a block cannot be skipped. Use a model whose blocks stand alone."
        )
    return len(output)


def _set_for_now(holder: Any, name: str, value: Any, undo: ExitStack) -> None:
    """Set an attribute until `undo` closes; one that the class alone had is deleted again."""
    if name in vars(holder) or name in vars(holder).get("_modules", {}):
        undo.callback(setattr, holder, name, getattr(holder, name))
    else:
        undo.callback(delattr, holder, name)
    setattr(holder, name, value)
