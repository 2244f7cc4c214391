"""Run a model's blocks on packed texts: embeddings and head see the batch as it is, the blocks no padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.models import Stack
from layerdistill.signals.hooks import hidden_of
from layerdistill.signals.packing import Packing


@contextmanager
def packed_blocks(stack: Stack | None, packing: Packing | None) -> Iterator[None]:
    """Let the blocks of a stack run on packed rows inside the block; with None nothing changes.

    The first block's input is packed and the last block's output laid out as the batch again, with zeros on padding;
    between them hidden states are `(rows, width, hidden)`. Each block gets its own attention mask, packed, so that no
    text sees another, and positions (rotary angles) go with their tokens. What else a block is given stays as it is,
    which may be wrong: ask `packing_problem` first.

    To be entered before `capture`. Raises UserError for a block that is given no attention mask `(batch, heads, seq,
    seq)`. Not for activation checkpointing: the backward pass would run the blocks without this.
    """
    if stack is None or packing is None:
        yield
        return
    with ExitStack() as hooks:
        given = _Given(packing)
        for block in stack.blocks:
            hooks.callback(block.register_forward_pre_hook(given.before, with_kwargs=True).remove)
        hooks.callback(stack.blocks[-1].register_forward_hook(partial(_unpacked, packing)).remove)
        yield


class _Given:
    """Packs what the blocks of one forward pass are given; what several of them are given, once."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.made: dict[int, tuple[Tensor, Tensor]] = {}
        self.masked = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Return a block's arguments, packed; the hidden states of all but the first block are so already."""
        self.masked = False
        changed = self.packed(args), self.packed(kwargs)
        if not self.masked:
            raise UserError(
                f"{type(module).__name__} is given no attention mask (batch, heads, seq, seq), so texts cannot be kept "
                "apart in packed rows. Write training.padding_free: false."
            )
        return changed

    def packed(self, value: Any) -> Any:
        """Return a value with all tensors packed that follow the batch's tokens."""
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, Mapping):
            return {name: self.packed(inner) for name, inner in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.packed(inner) for inner in value)
        return value

    def tensor(self, value: Tensor) -> Tensor:
        """Return a tensor packed, if its shape says that it follows tokens or pairs of them.

        What a block makes of packed rows and hands to the next is as wide as these, which the batch is not.
        """
        packing, shape = self.packing, value.shape
        pairs = value.dim() == 4 and shape[0] in (1, packing.batch) and shape[2] in (1, packing.seq)
        is_mask = pairs and shape[3] == packing.seq
        follows = value.dim() in (2, 3) and shape[0] in (1, packing.batch) and shape[1] == packing.seq
        if not (is_mask or follows):
            return value
        self.masked |= is_mask
        if id(value) not in self.made:
            # The tensor itself is kept too, so that no other one gets its id.
            self.made[id(value)] = value, packing.pack_mask(value) if is_mask else packing.pack(value)
        return self.made[id(value)][1]


def _unpacked(packing: Packing, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, Tensor):
        return packing.unpack(output)
    hidden = hidden_of(output)
    return type(output)(packing.unpack(value) if value is hidden else value for value in output)
