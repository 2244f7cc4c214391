"""Blocks with fewer attention heads or feed-forward neurons: where a block keeps them, and how to leave some out.

This file is copied beside a saved student that needs it, so it imports nothing but torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

KIND = "narrow"


class AttentionLayout(NamedTuple):
    """Where a block keeps its attention, as paths below the block.

    `inputs` are the matrices of queries, keys and values, or one that holds them all: its features are all queries,
    then all keys, then all values (`parts`), or head after head, each with its three (`per-head`). `also` are further
    matrices with the features of the queries, where there are any.
    """

    module: str
    inputs: tuple[str, ...]
    output: str
    fused: Literal["", "parts", "per-head"] = ""
    also: tuple[str, ...] = ()


class FeedForwardLayout(NamedTuple):
    """Where a block keeps its feed-forward part, as paths below the block.

    `inputs` are the matrices into the neurons (gated: two), `halves` says that one holds both, one after the other.
    """

    inputs: tuple[str, ...]
    output: str
    halves: bool = False


class Layout(NamedTuple):
    """How heads and neurons lie in the matrices of a block."""

    attention: AttentionLayout
    feed_forward: FeedForwardLayout


class HeadSizes(NamedTuple):
    """Features of a head, heads of queries, and heads of keys and values: the groups."""

    features: int
    queries: int
    groups: int


def _separate(module: str, names: str, output: str, also: str = "") -> AttentionLayout:
    inputs, further = (tuple(f"{module}.{name}" for name in given.split()) for given in (names, also))
    return AttentionLayout(module, inputs, output, also=further)


ATTENTION_LAYOUTS = (
    _separate("attention.self", "query key value", "attention.output.dense"),
    _separate(
        "attention.self", "query_proj key_proj value_proj", "attention.output.dense", "pos_key_proj pos_query_proj"
    ),
    _separate("self_attn", "q_proj k_proj v_proj", "self_attn.o_proj"),
    _separate("self_attn", "q_proj k_proj v_proj", "self_attn.out_proj"),
    _separate("self_attn", "q_proj k_proj v_proj", "self_attn.dense"),
    AttentionLayout("attn", ("attn.Wqkv",), "attn.Wo", "parts"),
    AttentionLayout("attn", ("attn.c_attn",), "attn.c_proj", "parts"),
    AttentionLayout("attention", ("attention.query_key_value",), "attention.dense", "per-head"),
)
"""BERT and RoBERTa; DeBERTa-v2; Llama and Qwen3; OPT; Phi; ModernBERT; GPT-2; GPT-NeoX; and others built like these."""

FEED_FORWARD_LAYOUTS = (
    FeedForwardLayout(("intermediate.dense",), "output.dense"),
    FeedForwardLayout(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    FeedForwardLayout(("fc1",), "fc2"),
    FeedForwardLayout(("mlp.fc1",), "mlp.fc2"),
    FeedForwardLayout(("mlp.Wi",), "mlp.Wo", halves=True),
    FeedForwardLayout(("mlp.c_fc",), "mlp.c_proj"),
    FeedForwardLayout(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
)

HEAD_SIZE_NAMES = ("head_dim", "attention_head_size", "head_size")
"""What attention modules call the size of a head."""


def layout_of(block: nn.Module) -> Layout | None:
    """Return how a block is laid out, None for a module that is no block of a known kind."""
    names = {name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    attention = [layout for layout in ATTENTION_LAYOUTS if names.issuperset((*layout.inputs, layout.output))]
    feed_forward = [layout for layout in FEED_FORWARD_LAYOUTS if names.issuperset((*layout.inputs, layout.output))]
    if len(attention) != 1 or len(feed_forward) != 1 or not _head_features(block, attention[0]):
        return None
    also = tuple(name for name in attention[0].also if name in names)
    return Layout(attention[0]._replace(also=also), feed_forward[0])


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return every block of a known kind in a model, in order."""
    return [module for module in model.modules() if layout_of(module) is not None]


def head_sizes(block: nn.Module, layout: AttentionLayout) -> HeadSizes:
    """Return the sizes of a block's heads, read from its matrices and from what its attention calls a head."""
    features = _head_features(block, layout)
    queries = axis_size(block.get_submodule(layout.output), outputs=False)
    keys = axis_size(block.get_submodule(layout.inputs[-1]), outputs=True)
    keys = (keys - queries) // 2 if layout.fused else keys
    return HeadSizes(features, queries // features, keys // features)


def neuron_count(block: nn.Module, layout: FeedForwardLayout) -> int:
    """Return how many feed-forward neurons a block has."""
    return axis_size(block.get_submodule(layout.output), outputs=False)


def head_features(layout: AttentionLayout, sizes: HeadSizes, groups: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return, for groups of heads, the output features of each of `layout.inputs` and the input features of its output.

    A group is a head of keys and values with the heads of queries that read it, so one head where none are shared.
    """
    queries = spread(groups, sizes.queries // sizes.groups * sizes.features)
    keys = spread(groups, sizes.features)
    if layout.fused == "per-head":
        return [spread(groups, 3 * sizes.features)], queries
    if layout.fused == "parts":
        start = sizes.queries * sizes.features
        return [torch.cat([queries, start + keys, start + sizes.groups * sizes.features + keys])], queries
    return [queries, keys, keys], queries


def neuron_features(layout: FeedForwardLayout, count: int, neurons: Tensor) -> Tensor:
    """Return, for some of `count` neurons, the output features of each of `layout.inputs`."""
    return torch.cat([neurons, count + neurons]) if layout.halves else neurons


def keep_heads(block: nn.Module, layout: AttentionLayout, groups: Sequence[int]) -> None:
    """Leave only some groups of heads in a block, numbered from 0."""
    sizes = head_sizes(block, layout)
    features, queries = head_features(layout, sizes, torch.tensor(groups))
    for name, kept in zip(layout.inputs, features, strict=True):
        keep_features(block.get_submodule(name), kept, outputs=True)
    for name in layout.also:
        keep_features(block.get_submodule(name), queries, outputs=True)
    keep_features(block.get_submodule(layout.output), queries, outputs=False)
    heads = len(groups) * (sizes.queries // sizes.groups)
    counts = {"num_heads": heads, "num_attention_heads": heads, "num_key_value_heads": len(groups)}
    counts |= {"all_head_size": heads * sizes.features, "split_size": heads * sizes.features}
    module = block.get_submodule(layout.module)
    for name, value in counts.items():
        if hasattr(module, name):
            setattr(module, name, value)


def keep_neurons(block: nn.Module, layout: FeedForwardLayout, neurons: Sequence[int]) -> None:
    """Leave only some feed-forward neurons in a block, numbered from 0."""
    kept = torch.tensor(neurons)
    features = neuron_features(layout, neuron_count(block, layout), kept)
    for name in layout.inputs:
        keep_features(block.get_submodule(name), features, outputs=True)
    keep_features(block.get_submodule(layout.output), kept, outputs=False)


def keep_features(linear: Any, kept: Tensor, outputs: bool) -> None:
    """Leave only some output (or input) features in a `Linear` or `Conv1D`, in place."""
    axis = feature_axis(linear, outputs)
    linear.weight = _selected(linear.weight, axis, kept)
    if outputs and linear.bias is not None:
        linear.bias = _selected(linear.bias, 0, kept)
    out_size, in_size = ("nf", "nx") if isinstance(linear, Conv1D) else ("out_features", "in_features")
    setattr(linear, out_size if outputs else in_size, len(kept))


def feature_axis(linear: nn.Module, outputs: bool) -> int:
    """Return the axis of the output (or input) features in the weight of a `Linear` or `Conv1D`."""
    return int(isinstance(linear, Conv1D) == outputs)


def axis_size(linear: Any, outputs: bool) -> int:
    """Return how many output (or input) features a `Linear` or `Conv1D` has."""
    return linear.weight.shape[feature_axis(linear, outputs)]


def spread(units: Tensor, size: int) -> Tensor:
    """Return the features of units of `size` features each, in the units' order."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def rebuild(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Give a freshly built stock model the number of heads that a narrowed student has; its config says the rest.

    `description` is `{"kind": "narrow", "num_attention_heads": n, "num_key_value_heads": m}`: what every block keeps,
    where the configuration goes on saying how many heads the hidden size is divided into. Raises ValueError when the
    model has no blocks of a known kind or their heads cannot be shared out like that.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks whose heads could be left out")
    heads, groups = description["num_attention_heads"], description["num_key_value_heads"]
    for block in blocks:
        layout = layout_of(block)
        assert layout is not None, "blocks_of returns those that have one"
        sizes = head_sizes(block, layout.attention)
        if not 1 <= groups <= sizes.groups or heads * sizes.groups != groups * sizes.queries:
            raise ValueError(f"{description} does not fit blocks of {sizes.queries} heads in {sizes.groups} groups")
        if groups < sizes.groups:
            keep_heads(block, layout.attention, range(groups))


def _head_features(block: nn.Module, layout: AttentionLayout) -> int:
    """Return the size of a head, 0 where the attention does not tell it."""
    module = block.get_submodule(layout.module)
    return next((value for name in HEAD_SIZE_NAMES if isinstance(value := getattr(module, name, None), int)), 0)


def _selected(parameter: nn.Parameter, axis: int, kept: Tensor) -> nn.Parameter:
    values = parameter.detach().index_select(axis, kept.to(parameter.device))
    return nn.Parameter(values, requires_grad=parameter.requires_grad)
