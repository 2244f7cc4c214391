"""Make a student: a stock model of the teacher's class with fewer blocks or narrower, initialised from the teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.core.seeds import seeded
from layerdistill.core.types import StackName
from layerdistill.models.shrink import Init, NumBlocks, block_sources, build_on_meta, shrink_config
from layerdistill.models.slicing import cut, sizes_of
from layerdistill.models.structure import Stack, find_stacks, unwrap


def make_student(
    teacher: nn.Module,
    num_blocks: NumBlocks = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    init: Init = "copy",
    copy_map: str | Sequence[int] = "forward",
    seed: int = 0,
) -> PreTrainedModel:
    """Return a smaller model of the teacher's class, in its dtype and on its device, in eval mode and trainable.

    `init` is `copy` (whole teacher blocks, embeddings, head; needs the teacher's width), `truncate` (the first rows and
    columns of every matrix, as the CKA authors do, but never through a head), `truncate_raw` (the same as they do it:
    with any number of heads, and through a head where its size changes) or `random`. `copy_map` says which teacher
    block each student block is made of: see `block_sources`. `num_blocks` is a number, or
    `{"encoder": n, "decoder": m}`. A tensor that the chosen block lacks (T5 keeps its relative positions, ModernBERT
    lacks a norm, in the first block) comes from the nearest teacher block that has it.
    Raises UserError for a shape, a map or an architecture of which no such student can be made.
    """
    model = unwrap(teacher)
    stacks = find_stacks(model)
    if model is not teacher and hasattr(teacher, "peft_config"):
        raise UserError("the teacher is wrapped in PEFT adapters: call merge_and_unload() on it and pass the result.")
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        raise UserError(f"{type(model).__name__} holds quantised weights; load the teacher in float32 or bfloat16.")
    if getattr(model.config, "layerdistill", None):
        shape = (num_blocks, hidden_size, intermediate_size, num_attention_heads)
        return _whole_copy(model, any(value is not None for value in shape) or init != "copy" or copy_map != "forward")
    config = shrink_config(
        model.config, num_blocks, hidden_size, intermediate_size, num_attention_heads, init, copy_map, seed
    )
    model_class: type[Any] = type(model)
    build_on_meta(copy.deepcopy(config), model_class)
    with seeded(seed, "student"):
        student: PreTrainedModel = model_class(config)
    student = student.to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
    if init != "random":
        depths = {name: stack.depth for name, stack in stacks.items()}
        sources = block_sources(depths, num_blocks, copy_map, seed)
        _copy_weights(model, student, stacks, sources)
    if getattr(model, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()


def freeze_embeddings(model: nn.Module) -> None:
    """Turn off the gradient of every embedding table outside the blocks: tokens, positions, token types.

    As the released BART and T5 scripts of Yu et al. (2025, https://arxiv.org/abs/2502.04499) do. Norms after the tables
    still train, and so do T5's relative positions, which are part of its first block; an output matrix that is tied to
    the token table does not.
    """
    blocks = [block for stack in find_stacks(model).values() for block in stack.blocks]
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in unwrap(model).modules():
        if isinstance(module, nn.Embedding) and id(module) not in inside:
            module.requires_grad_(False)


def _whole_copy(model: PreTrainedModel, changed: bool) -> PreTrainedModel:
    """Return a copy of a model whose blocks are of its own kind; raises UserError when a changed one is wanted."""
    if changed:
        raise UserError(
            f"{type(model).__name__} has blocks of its own kind (config.layerdistill), so no other student can be cut "
            "out of it. Take it as the student itself (student.model), or cut one out of a stock model."
        )
    return copy.deepcopy(model).eval().requires_grad_(True)


@torch.no_grad()
def _copy_weights(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    stacks: dict[StackName, Stack],
    sources: dict[StackName, tuple[int, ...]],
) -> None:
    """Fill every tensor of the student's state with the teacher's, cut to its shape."""
    sizes = sizes_of(teacher.config, student.config)
    state = teacher.state_dict()
    for name, target in student.state_dict().items():
        source = _source_name(name, state, stacks, sources)
        target.copy_(cut(state[source], target.shape, source, teacher, sizes))


def _source_name(
    name: str, state: dict[str, Tensor], stacks: dict[StackName, Stack], sources: dict[StackName, tuple[int, ...]]
) -> str:
    """Return the name of the teacher's tensor that the student's `name` is made of."""
    for stack_name, stack in stacks.items():
        prefix = stack.block_path + "."
        if not name.startswith(prefix):
            continue
        number, _, tail = name.removeprefix(prefix).partition(".")
        chosen = sources[stack_name][int(number)]
        for block in sorted(range(stack.depth), key=lambda block: abs(block - chosen)):
            if f"{prefix}{block}.{tail}" in state:
                return f"{prefix}{block}.{tail}"
    if name not in state:
        raise UserError(
            f"the student has a tensor {name} that no block of the teacher has; use init: random, or another depth."
        )
    return name
