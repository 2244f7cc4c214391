"""Cut a teacher's tensor down to the student's shape: first rows and columns, inside each fused part.

Heads stay whole where the student's configuration keeps their size (`init: truncate`); where it does not (`init:
truncate_raw`) the first rows of all queries, of all keys and of all values are kept, through whatever head they end in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from layerdistill.core.errors import UserError
from layerdistill.models.fields import StackFields, stack_fields
from layerdistill.models.overrides import (
    FUSED_LAYOUT,
    FUSED_LAYOUT_IN,
    ONE_PART_NAMES,
    PER_HEAD_NAMES,
    Layout,
)

Pair = tuple[int, int]
"""A size in the teacher and the same size in the student."""


@dataclass(frozen=True)
class Sizes:
    """The sizes an axis can have. `plain` are those of one kind of thing, whose first entries are kept."""

    plain: frozenset[Pair]
    query: Pair
    key_value: Pair
    head: Pair
    heads: Pair


def sizes_of(teacher: PretrainedConfig, student: PretrainedConfig) -> Sizes:
    """Return the sizes that a teacher's configuration and its shrunken one give to axes."""
    plain: set[Pair] = set()
    for old, new in zip(stack_fields(teacher).values(), stack_fields(student).values(), strict=True):
        plain |= _changed(old.section, new.section)
        width = (getattr(old.section, old.width), getattr(new.section, new.width))
        if not old.intermediate:
            # BLOOM, and GPT-2 where `n_inner` is empty; the student's may have been given.
            given = [new.value(key) for key in new.intermediate]
            plain.add((4 * width[0], given[0] if given and given[0] else 4 * width[1]))
        heads = (old.value(old.heads) or 1, new.value(new.heads) or 1)
        kv_heads = (old.value(old.kv_heads) or heads[0], new.value(new.kv_heads) or heads[1])
        head = (_head_size(old, width[0] // heads[0]), _head_size(new, width[1] // heads[1]))
        query = (heads[0] * head[0], heads[1] * head[1])
        key_value = (kv_heads[0] * head[0], kv_heads[1] * head[1])
        plain |= {query, key_value, heads}
    return Sizes(frozenset(plain), query, key_value, head, heads)


def cut(tensor: Tensor, shape: torch.Size, name: str, model: nn.Module, sizes: Sizes) -> Tensor:
    """Return the part of `tensor`, the teacher's `name`, that becomes the student's tensor of `shape`.

    Raises UserError when an axis is of a size whose layout is not known, or has to grow, rather than guess.
    """
    resized_heads = sizes.head[0] != sizes.head[1]
    if tensor.shape == shape and not resized_heads:
        return tensor
    layout, fused_axis = _layout(tensor, shape, name, model, sizes)
    if tensor.dim() != len(shape) or (resized_heads and fused_axis is not None and layout in ("per-head", "unknown")):
        # Equal shapes are no way out: rows that follow head after head mean something else in heads of another size.
        raise _unknown(name, tensor, shape)
    for axis, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)):
        if new > old:
            raise _unknown(name, tensor, shape)
        if old == new or (axis != fused_axis and (old, new) in sizes.plain):
            parts = [(old, new)]
        elif axis == fused_axis:
            parts = _parts(layout, (old, new), sizes)
        else:
            words = name.split(".")[-2:]
            per_head = not PER_HEAD_NAMES.isdisjoint(words) and _per_head(old, new, sizes)
            parts = [(old, new)] if per_head or not ONE_PART_NAMES.isdisjoint(words) else []
        if sum(kept for _, kept in parts) != new:
            raise _unknown(name, tensor, shape)
        pieces = torch.split(tensor, [whole for whole, _ in parts], dim=axis)
        tensor = torch.cat([piece.narrow(axis, 0, kept) for piece, (_, kept) in zip(pieces, parts, strict=True)], axis)
    return tensor


def _changed(old: PretrainedConfig, new: PretrainedConfig) -> set[Pair]:
    """Return every number of a configuration, before and after, that got smaller."""
    pairs: set[Pair] = set()
    for key, before in vars(old).items():
        after = vars(new).get(key)
        if isinstance(before, int) and isinstance(after, int) and after < before:
            pairs.add((before, after))
        elif isinstance(before, list) and isinstance(after, list) and all(isinstance(n, int) for n in before + after):
            pairs |= {(a, b) for a in before for b in after}
    return pairs


def _head_size(fields: StackFields, implied: int) -> int:
    return fields.value(fields.head_size) or implied


def _layout(tensor: Tensor, shape: torch.Size, name: str, model: nn.Module, sizes: Sizes) -> tuple[Layout, int | None]:
    """Return how a fused matrix is laid out and along which axis; the axis is None when `name` is not fused."""
    path, _, kind = name.rpartition(".")
    owner = model.get_submodule(path)
    own_module = kind in ("weight", "bias")
    if own_module:
        path, _, kind = path.rpartition(".")
    axis = 1 if isinstance(owner, Conv1D) and tensor.dim() == 2 else 0
    if tensor.dim() > 2 or not own_module:
        # Nothing says which axis of a tensor of several experts is the output: it is the one of no plain size.
        axes = [n for n, pair in enumerate(zip(tensor.shape, shape, strict=True)) if pair[0] != pair[1]]
        axis = next((n for n in axes if (tensor.shape[n], shape[n]) not in sizes.plain), -1)
    holder = type(model.get_submodule(path)).__name__
    layout = FUSED_LAYOUT_IN.get((holder, kind), FUSED_LAYOUT.get(kind))
    return ("unknown", None) if layout is None else (layout, axis)


def _parts(layout: Layout, axis: Pair, sizes: Sizes) -> list[Pair]:
    """Return the parts of a fused axis with what is kept of each, or nothing when they do not add up."""
    query, key_value, head = sizes.query, sizes.key_value, sizes.head
    if layout == "halves":
        candidates = [[(axis[0] // 2, axis[1] // 2)] * 2]
    elif layout == "qkv":
        candidates = [[query, key_value, key_value], [query] * 3, [query, head, head], [query] * 2, [key_value] * 2]
    elif layout == "per-head":
        # With one key/value head for all queries (Falcon-7B, SantaCoder) the head is not repeated and the parts are.
        candidates = [[query, head, head], [axis] if _per_head(*axis, sizes) else []]
    else:
        candidates = []
    return next((parts for parts in candidates if _total(parts) == axis), [])


def _per_head(old: int, new: int, sizes: Sizes) -> bool:
    """Return whether an axis is as large for every head as it was."""
    return old % sizes.heads[0] == 0 and new == old // sizes.heads[0] * sizes.heads[1]


def _total(parts: list[Pair]) -> Pair:
    return sum(whole for whole, _ in parts), sum(kept for _, kept in parts)


def _unknown(name: str, tensor: Tensor, shape: torch.Size) -> UserError:
    return UserError(
        f"init: truncate cannot cut {name} from {tuple(tensor.shape)} to {tuple(shape)}: how its rows belong to heads "
        "or parts is not known for this architecture and shape, and a cut across parts would be worthless (which holds "
        "for truncate_raw too). Keep the teacher's hidden_size (init: copy), or use init: random."
    )
