"""Make blocks narrower in place: score attention heads and feed-forward neurons, and remove some of every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.models.count import count_parameters
from layerdistill.models.modeling_narrow import (
    Layout,
    blocks_of,
    feature_axis,
    head_features,
    head_sizes,
    keep_heads,
    keep_neurons,
    layout_of,
    neuron_count,
    neuron_features,
)
from layerdistill.models.narrow_config import describe_in_config
from layerdistill.models.structure import find_stacks, unwrap


@dataclass(frozen=True)
class Units:
    """What every one of `blocks` can lose: `heads` groups of heads and `neurons`, with their parameters.

    A group is a head of keys and values with the heads of queries that read it (one head where none are shared).
    `parameters_per_head` and `parameters_per_neuron` are summed over all blocks: what the model loses when every block
    loses one; biases that go with them are counted. `parameters` is the whole model.
    """

    blocks: int
    heads: int
    neurons: int
    queries_per_head: int
    parameters_per_head: int
    parameters_per_neuron: int
    parameters: int

    def parameters_without(self, heads: int, neurons: int) -> int:
        """Return what the model has after every block lost so many groups of heads and neurons."""
        return self.parameters - heads * self.parameters_per_head - neurons * self.parameters_per_neuron


def count_units(model: nn.Module) -> Units:
    """Return what every block of `model` can lose; works on the meta device as well.

    Raises UserError when heads and neurons cannot be told apart in its blocks, or the blocks differ in size.
    """
    sizes = set()
    per_head = per_neuron = 0
    blocks = narrowable_blocks(model)
    for block, layout in blocks:
        heads, neurons = head_sizes(block, layout.attention), neuron_count(block, layout.feed_forward)
        sizes.add((heads, neurons))
        attention = layout.attention
        per_head += _count(block, (*attention.inputs, *attention.also), attention.output) // heads.groups
        per_neuron += _count(block, layout.feed_forward.inputs, layout.feed_forward.output) // neurons
    if len(sizes) != 1:
        raise UserError(
            f"the blocks of {type(unwrap(model)).__name__} differ in their heads or neurons, so the same number cannot "
            "be removed from every block. Start from a model whose blocks are all of one size."
        )
    heads, neurons = sizes.pop()
    whole = count_parameters(model)["total"]
    return Units(len(blocks), heads.groups, neurons, heads.queries // heads.groups, per_head, per_neuron, whole)


@torch.no_grad()
def score_heads(model: nn.Module) -> list[Tensor]:
    """Return one `(groups,)` float64 tensor per block: the sum of |w| over a group's slices of W_Q, W_K, W_V and W_O.

    Biases, and the position projections that some DeBERTa models add, do not count. Raises UserError like
    `count_units`.
    """
    scores = []
    for block, layout in narrowable_blocks(model):
        attention = layout.attention
        sizes = head_sizes(block, attention)
        sums = [_sums(block, name, outputs=True) for name in attention.inputs]
        sums.append(_sums(block, attention.output, outputs=False))
        score = torch.zeros_like(sums[-1][: sizes.groups])
        for group in range(sizes.groups):
            inputs, output = head_features(attention, sizes, torch.tensor([group]))
            for of, features in zip(sums, (*inputs, output), strict=True):
                score[group] += of[features].sum()
        scores.append(score)
    return scores


@torch.no_grad()
def score_neurons(model: nn.Module) -> list[Tensor]:
    """Return one `(neurons,)` float64 tensor per block: the sum of |w| into a neuron (gated: both) and out of it.

    Biases do not count. Raises UserError like `count_units`.
    """
    scores = []
    for block, layout in narrowable_blocks(model):
        feed_forward = layout.feed_forward
        count = neuron_count(block, feed_forward)
        score = _sums(block, feed_forward.output, outputs=False)
        for name in feed_forward.inputs:
            sums = _sums(block, name, outputs=True)
            every = torch.arange(count, device=sums.device)
            score = score + sums[neuron_features(feed_forward, count, every)].view(-1, count).sum(0)
        scores.append(score)
    return scores


def lowest(score: Tensor, number: int) -> list[int]:
    """Return the places of the `number` lowest scores, in ascending order; of equal ones, the first come first."""
    return sorted(score.argsort(stable=True)[:number].tolist())


def remove_units(model: nn.Module, heads: Sequence[Sequence[int]], neurons: Sequence[Sequence[int]]) -> bool:
    """Remove groups of heads and neurons from every block of `model` in place, and return whether it is stock again.

    `heads` and `neurons` list, for each block, what goes; all blocks lose the same number, and at least one of each
    stays. The configuration is changed to say the new sizes. Where it cannot (the head size is the hidden size divided
    by the number of heads), it keeps the number of heads and gets `layerdistill`, the description that
    `modeling_narrow.rebuild` reads. Raises UserError like `count_units`, and for lists that do not fit.
    """
    units = count_units(model)
    for given, size, what in ((heads, units.heads, "heads"), (neurons, units.neurons, "neurons")):
        _check(given, size, units.blocks, what)
    for (block, layout), head_list, neuron_list in zip(narrowable_blocks(model), heads, neurons, strict=True):
        if head_list:
            keep_heads(block, layout.attention, _others(units.heads, head_list))
        if neuron_list:
            keep_neurons(block, layout.feed_forward, _others(units.neurons, neuron_list))
    return describe_in_config(unwrap(model))


def narrowable_blocks(model: nn.Module) -> list[tuple[nn.Module, Layout]]:
    """Return the blocks of a model with one stack, and how each is laid out.

    Raises UserError for an encoder-decoder, and when a block keeps its heads and neurons in a way that is not known.
    """
    model = unwrap(model)
    stacks = find_stacks(model)
    if set(stacks) != {""}:
        raise UserError(
            f"{type(model).__name__} has an encoder and a decoder: heads and neurons are removed from models with one "
            "stack of blocks only."
        )
    found = []
    for block in stacks[""].blocks:
        layout = layout_of(block)
        if layout is None or _unknown_tensors(block, layout):
            what = f"holds {_unknown_tensors(block, layout)[0]}" if layout else "is laid out in a way"
            raise UserError(
                f"{type(block).__name__} {what} of which it is not known what belongs to which head or neuron, so none "
                "can be removed from it. Known are the blocks of BERT, RoBERTa, DeBERTa-v2, ModernBERT, GPT-2, OPT, "
                "GPT-NeoX, Llama, Qwen3 and Phi, and those built like them."
            )
        found.append((block, layout))
    if len(blocks_of(model)) != len(found):
        raise UserError(
            f"{type(model).__name__} has more blocks than those of its language model (of an image, of speech): heads "
            "and neurons are removed from models with one stack of blocks only."
        )
    return found


def _unknown_tensors(block: nn.Module, layout: Layout) -> list[str]:
    """Return the attention's tensors that are neither a known matrix nor the same for every head."""
    attention = layout.attention
    features = head_sizes(block, attention).features
    known = {name.removeprefix(f"{attention.module}.") for name in (*attention.inputs, *attention.also)}
    known.add(attention.output.removeprefix(f"{attention.module}."))
    return [
        name
        for name, parameter in block.get_submodule(attention.module).named_parameters()
        if name.rpartition(".")[0] not in known and parameter.shape != (features,)
    ]


def _sums(block: nn.Module, name: str, outputs: bool) -> Tensor:
    """Return the sum of |w| of every output (or input) feature of a matrix, in float64."""
    linear: Any = block.get_submodule(name)
    return linear.weight.abs().sum(1 - feature_axis(linear, outputs), dtype=torch.float64)


def _count(block: nn.Module, inputs: Sequence[str], output: str) -> int:
    """Return the parameters that belong to units: matrices into them with their biases, and the matrix out of them."""
    out: Any = block.get_submodule(output)
    return out.weight.numel() + sum(p.numel() for name in inputs for p in block.get_submodule(name).parameters())


def _others(size: int, removed: Sequence[int]) -> list[int]:
    return sorted(set(range(size)) - set(removed))


def _check(given: Sequence[Sequence[int]], size: int, blocks: int, what: str) -> None:
    numbers = {len(set(removed)) for removed in given}
    inside = all(0 <= unit < size for removed in given for unit in removed)
    if len(given) != blocks or len(numbers) != 1 or not inside or max(numbers) >= size:
        raise UserError(
            f"the {what} to remove were given for {len(given)} blocks, {sorted(numbers)} each; the model has {blocks} "
            f"blocks of {size} {what}: give as many for every block, numbered from 0 to {size - 1}, and leave one."
        )
