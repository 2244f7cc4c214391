"""Take hidden states out of a running model with hooks: only the layers asked for, before any final norm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef, StackName
from layerdistill.models import Stack, find_stacks, unwrap

Layer = int | str | LayerRef


class Captured(Mapping[LayerRef, Tensor]):
    """Layer -> its hidden states `(batch, seq, hidden)`, in the model's dtype and with their graph.

    Filled by the forward passes inside `with capture(...)`, each of which replaces the one before. A layer is read by
    `LayerRef`, number or name; UserError for one that was not asked for, or that the model did not run.
    """

    def __init__(self, layers: tuple[LayerRef, ...]) -> None:
        self.layers = layers
        self.tensors: dict[LayerRef, Tensor] = {}

    def __getitem__(self, layer: Layer) -> Tensor:
        wanted = LayerRef.parse(layer)
        if wanted in self.tensors:
            return self.tensors[wanted]
        asked = ", ".join(map(str, self.layers)) or "none"
        if wanted not in self.layers:
            raise UserError(f"layer {wanted} was not captured; those asked for are: {asked}. Add it to layers=[...].")
        raise UserError(
            f"layer {wanted} was asked for, but the model has not run it: call the model inside `with capture(...)`. "
            "(A model that drops whole blocks in training, LayerDrop, must have that turned off.)"
        )

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int | str | LayerRef) and LayerRef.parse(layer) in self.tensors

    def __iter__(self) -> Iterator[LayerRef]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@contextmanager
def capture(
    model: nn.Module, layers: Iterable[Layer], blocks: str | Mapping[str, str] | None = None
) -> Iterator[Captured]:
    """Yield a mapping that the model's forward passes fill: `with capture(model, [0, 2, "final"]) as hidden: ...`.

    Layer 0 is the input of the first block, k the output of block k before any final norm, `final` what the final norm
    makes of the last (the last itself where there is none). DeBERTa-v2's convolution, where a model has one, comes
    after block 1 and is not in layer 1. Each tensor is a copy, so that later in-place arithmetic does not reach it.
    Works through DistributedDataParallel and PEFT wrappers. `blocks` is as in `find_stacks`.
    Non-reentrant gradient checkpointing gives the same tensors and gradients: a block run again by the backward pass is
    not captured again. Raises UserError for a layer that the model does not have, and for a tensor that checkpointing
    cut off from the graph, which would train nothing. The hooks are gone afterwards, also after an exception.
    """
    stacks = find_stacks(model, blocks)
    wanted = tuple(dict.fromkeys(check_layer(stacks, LayerRef.parse(layer)) for layer in layers))
    captured = Captured(wanted)
    with ExitStack() as hooks:
        for name, stack in stacks.items():
            numbers = {layer.number for layer in wanted if layer.stack == name}
            if numbers:
                holder = unwrap(model).get_submodule(stack.block_path.rpartition(".")[0])
                _StackHooks(stack, captured).put(hooks, holder, numbers)
        yield captured


def check_layer(stacks: Mapping[StackName, Stack], layer: LayerRef) -> LayerRef:
    """Return `layer` if a model with these stacks has it, else raise UserError that says what it has."""
    if layer.stack not in stacks:
        if "" in stacks:
            raise UserError(f"layer {layer}: this model has one stack of blocks, so write {str(layer).split('.')[-1]}.")
        raise UserError(
            f"layer {layer}: this model has an encoder and a decoder, so say which: encoder.{layer} or decoder.{layer}."
        )
    depth = stacks[layer.stack].depth
    if layer.number > depth:
        raise UserError(
            f"layer {layer} does not exist: the {layer.stack or 'model'} has {depth} blocks, so layers are 0 (what "
            f"enters the first block) to {depth} (what leaves the last), and 'final'."
        )
    return layer


@dataclass
class _StackHooks:
    """The hooks of one stack; `grad_outside` is the grad mode in which the module that holds the blocks was called."""

    stack: Stack
    captured: Captured
    grad_outside: bool = False

    def put(self, hooks: ExitStack, holder: nn.Module, numbers: set[int]) -> None:
        """Put the hooks on their modules, for as long as `hooks` is open."""
        blocks, norm = self.stack.blocks, self.stack.final_norm
        hooks.callback(holder.register_forward_pre_hook(self.enter).remove)
        hooks.callback(blocks[0].register_forward_pre_hook(partial(self.start, 0 in numbers), with_kwargs=True).remove)
        for number in numbers - {0}:
            module = blocks[number - 1] if number > 0 else norm or blocks[-1]
            hooks.callback(module.register_forward_hook(partial(self.after, number)).remove)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note the grad mode: checkpointing may run the blocks themselves, hooks and all, without a graph."""
        self.grad_outside = torch.is_grad_enabled()

    def start(self, wanted: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first block: forget the pass before, keep layer 0."""
        if _in_backward():
            return
        for layer in [layer for layer in self.captured.tensors if layer.stack == self.stack.name]:
            del self.captured.tensors[layer]
        if wanted:
            self.keep(0, hidden_of([*args, kwargs.get("hidden_states"), *kwargs.values()]))

    def after(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a block or the final norm: keep what it returned."""
        if not _in_backward():
            self.keep(number, hidden_of(output if isinstance(output, tuple | list) else [output]))

    def keep(self, number: int, tensor: Tensor) -> None:
        """Keep a copy of a layer, if the graph that it should have is there."""
        layer = LayerRef(self.stack.name, number)
        blocks = self.stack.blocks if number < 0 else self.stack.blocks[:number]
        copy = tensor.clone()
        graph_expected = self.grad_outside or torch.is_grad_enabled()
        if graph_expected and not copy.requires_grad and any(p.requires_grad for b in blocks for p in b.parameters()):
            raise UserError(
                f"layer {layer} was captured without a graph though the blocks below it train, so a loss on it would "
                "train nothing. Reentrant gradient checkpointing does this: set gradient_checkpointing_kwargs: "
                "{use_reentrant: false}."
            )
        self.captured.tensors[layer] = copy


def hidden_of(values: Iterable[Any]) -> Tensor:
    """Return the first floating-point tensor."""
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise UserError("a block takes or returns no hidden states that can be told by their type, so none are captured.")


def _in_backward() -> bool:
    """Return whether the autograd engine is running on this thread: checkpointing then runs blocks a second time."""
    return torch._C._current_graph_task_id() != -1
