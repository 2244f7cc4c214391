"""Compact blocks for a model of any architecture: their shape, derived from the model's, and putting them in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.core.seeds import seeded
from layerdistill.models.fields import INTERMEDIATE_FIELDS, StackFields, stack_fields
from layerdistill.models.modeling_compact import KIND, CompactBlock, build_block, put_block
from layerdistill.models.overrides import FOLLOWS_WIDTH
from layerdistill.models.own_code import stock_class
from layerdistill.models.shrink import has_an_entry_per_layer
from layerdistill.models.structure import Stack, find_stacks, unwrap

DIVIDED_BY = 6
"""What the width is divided by where no compact width is given; GPT-2 in the paper: 768 / 128."""

_UNBUILDABLE = (
    ValueError, TypeError, KeyError, IndexError, RuntimeError, ArithmeticError, AssertionError, StrictDataclassError,
)  # fmt: skip

FIRST_DROPOUT = ("embd_pdrop", "hidden_dropout_prob", "hidden_dropout", "embedding_dropout", "dropout")
"""What configurations call the dropout on what enters the first block."""


@dataclass(frozen=True)
class CompactShape:
    """What a compact block looks like; None is derived from the model by `describe_compact`."""

    hidden_size: int | None = None
    num_inner_blocks: int = 2
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    activation: Literal["relu", "none"] = "relu"
    position_table: bool = True
    dropout: float | None = None


def describe_compact(model: nn.Module, shape: CompactShape) -> dict[str, Any]:
    """Return the description (see `modeling_compact.rebuild`) of compact blocks for `model`, none of them put in yet.

    Heads keep the model's head size unless both width and heads are given; the width is a sixth of the model's,
    rounded down to whole heads (at least one); the feed-forward width keeps its proportion to the hidden size. Inner
    blocks share key/value heads as the model's do. Models with learned positions get a table of their own width.
    Raises UserError for sizes that do not fit and for a model that cannot have such blocks.
    """
    inner = unwrap(model)
    stacks = find_stacks(inner)
    _refuse_unfit(inner, stacks)
    stack, fields = stacks[""], stack_fields(inner.config)[""]
    base: Any = inner.base_model
    width, heads, head_size = compact_width(inner.config, shape)
    changes: dict[str, Any] = {fields.width: width, fields.depth: shape.num_inner_blocks + 1}
    changes |= {key: width for key in FOLLOWS_WIDTH if vars(fields.section).get(key) is not None}
    changes |= {fields.heads: heads} if fields.heads else {}
    changes |= {fields.head_size: head_size} if fields.head_size else {}
    changes |= _key_value_heads(fields, heads)
    changes |= _feed_forward(fields, shape, width)
    # The inner model's own embeddings and head are dropped.
    stored = fields.section.to_dict()
    changes |= {key: None for key in stored if key.endswith("_token_id")} | {"vocab_size": 1, "pad_token_id": 0}
    if shape.dropout is not None:
        changes |= {key: shape.dropout for key, value in stored.items() if is_dropout(key, value)}
    tables = _position_tables(base)
    if not shape.position_table and stored.get("relative_attention"):
        changes["relative_attention"] = False
    padding = next((table.padding_idx for table in tables if table.padding_idx is not None), None)
    first = next((float(stored[key]) for key in FIRST_DROPOUT if isinstance(stored.get(key), float | int)), 0.0)
    return {
        "kind": KIND,
        "replaced": [],
        "blocks": _below_base(inner, stack.block_path),
        "norm": None if stack.final_norm_path is None else _below_base(inner, stack.final_norm_path),
        "num_inner_blocks": shape.num_inner_blocks,
        "config": changes,
        "per_layer": [key for key, value in stored.items() if _is_per_layer(key, value, stack.depth)],
        "activation": shape.activation,
        "positions": fields.section.max_position_embeddings if tables and shape.position_table else 0,
        "first_position": 0 if padding is None else padding + 1,
        "dropout": first if shape.dropout is None else shape.dropout,
    }


def compact_width(config: PretrainedConfig, shape: CompactShape) -> tuple[int, int, int]:
    """Return the width, the heads and the head size of the inner blocks; raises UserError where they do not fit."""
    fields = stack_fields(config)[""]
    width, heads = fields.value(fields.width), fields.value(fields.heads)
    if not width or not heads:
        raise UserError(
            f"{type(config).__name__} does not say how many heads its blocks have, so none can be narrower."
        )
    head_size = fields.value(fields.head_size) or width // heads
    if shape.hidden_size is None:
        count = shape.num_attention_heads or max(width // DIVIDED_BY // head_size, 1)
        return count * head_size, count, head_size
    count = shape.num_attention_heads or max(shape.hidden_size // head_size, 1)
    if shape.hidden_size % count:
        raise UserError(
            f"method.block.hidden_size is {shape.hidden_size}, which {count} heads do not divide. Give "
            "method.block.num_attention_heads a divisor of it."
        )
    return shape.hidden_size, count, shape.hidden_size // count


def new_compact_block(model: nn.Module, description: dict[str, Any], number: int, seed: int) -> CompactBlock:
    """Return a compact block for the place of block `number` (from 0), drawn from `seed`, where that block is.

    Raises UserError when the model's class makes no blocks of the described size.
    """
    inner = unwrap(model)
    like = next(inner.base_model.get_submodule(f"{description['blocks']}.{number}").parameters())
    try:
        with seeded(seed, "compact", number), torch.device("meta" if like.is_meta else "cpu"):
            block = build_block(inner, description, number)
    except _UNBUILDABLE as error:
        raise UserError(
            f"a compact block cannot be made of {type(inner).__name__}'s blocks with {description['config']}: "
            f"{type(error).__name__}: {error}. Choose other sizes in method.block, or a model of another architecture."
        ) from error
    return block.to(dtype=like.dtype) if like.is_meta else block.to(device=like.device, dtype=like.dtype)


def put_compact_block(model: nn.Module, description: dict[str, Any], number: int, block: nn.Module) -> dict[str, Any]:
    """Put a compact block in the place of block `number` (from 0); returns, and notes in the config, what is there."""
    inner = unwrap(model)
    put_block(inner, description, number, block)
    description = {**description, "replaced": [*description["replaced"], number]}
    inner.config.layerdistill = description
    return description


def block_path(model: nn.Module, description: dict[str, Any], number: int) -> str:
    """Return the dotted path of block `number` (from 0) in a model with its head."""
    inner = unwrap(model)
    base = next(name for name, module in inner.named_modules() if module is inner.base_model)
    return f"{base + '.' if base else ''}{description['blocks']}.{number}"


def is_dropout(key: str, value: Any) -> bool:
    """Whether a configuration's field is a share of activations inside a block that are set to 0 while training."""
    named = ("dropout" in key or "pdrop" in key) and "classifier" not in key
    return named and isinstance(value, float | int) and not isinstance(value, bool)


def _refuse_unfit(model: PreTrainedModel, stacks: dict[Any, Stack]) -> None:
    stock_class(model)
    name = type(model).__name__
    if "" not in stacks:
        raise UserError(
            f"{name} has an encoder and a decoder. Compact blocks take the place of blocks that read hidden states "
            "only; a decoder's also read the encoder. Take a model with one stack of blocks."
        )
    if getattr(model.config, "add_cross_attention", False):
        raise UserError(f"{name} has cross-attention in its blocks, which compact blocks have not. Take another model.")
    if getattr(model.config, "layerdistill", None):
        raise UserError(f"{name} already has blocks of its own kind (config.layerdistill). Take a stock model.")
    if getattr(model.config, "is_heterogeneous", False):
        raise UserError(
            f"The blocks of {name} differ in shape from layer to layer, which compact blocks cannot follow."
        )
    shared = {id(block) for block in stacks[""].blocks}
    if len(shared) < stacks[""].depth:
        raise UserError(f"The blocks of {name} are one block used again and again, so none can be replaced alone.")


def _key_value_heads(fields: StackFields, heads: int) -> dict[str, int]:
    theirs, shared = fields.value(fields.heads), fields.value(fields.kv_heads)
    if fields.kv_heads is None or not theirs or not shared:
        return {}
    group = theirs // shared
    return {fields.kv_heads: max(heads // group, 1) if heads % group == 0 or heads < group else heads}


def _feed_forward(fields: StackFields, shape: CompactShape, width: int) -> dict[str, int]:
    """Return the feed-forward widths; an empty field (GPT-2's: 4 times the hidden size) stays so if none is given."""
    whole = fields.value(fields.width)
    values = {key: value for key in fields.intermediate if isinstance(value := vars(fields.section)[key], int)}
    if not values and shape.intermediate_size is not None:
        values = {key: 0 for key in INTERMEDIATE_FIELDS if key in vars(fields.section)}
    if not values and shape.intermediate_size is not None:
        raise UserError(
            f"method.block.intermediate_size is {shape.intermediate_size}, but {type(fields.section).__name__} has no "
            "such field: leave it out."
        )
    given = shape.intermediate_size
    return {key: given or max(value * width // (whole or 1), 1) for key, value in values.items()}


def _position_tables(base: nn.Module) -> list[nn.Embedding]:
    """Return the tables of learned absolute positions: embeddings outside the blocks that are named so."""
    return [
        module
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in (leaf := name.rpartition(".")[2]) or leaf == "wpe")
    ]


def _is_per_layer(key: str, value: Any, depth: int) -> bool:
    return isinstance(value, list) and len(value) == depth and has_an_entry_per_layer(key, value)


def _below_base(model: PreTrainedModel, path: str) -> str:
    """Return a module's path below the base model, which is the same whatever head is above."""
    base = next(name for name, module in model.named_modules() if module is model.base_model)
    return path.removeprefix(base + ".") if base else path
