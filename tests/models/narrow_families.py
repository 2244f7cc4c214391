"""Tiny models whose heads and neurons are removed, and the whole models in which those are silent."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from tiny_models import DECODERS, ENCODERS, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

FAMILIES = (*ENCODERS, *DECODERS)
GROUPED = ("llama", "qwen3")
BLOCKS, WIDTH, SIZE = 3, 32, 4
"""Every model has 3 blocks x 32 and 8 heads of 4; in the grouped families two of them share keys and values."""

OUTPUTS = {
    "bert": ("attention.output.dense", "output.dense"),
    "roberta": ("attention.output.dense", "output.dense"),
    "deberta-v2": ("attention.output.dense", "output.dense"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt-neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "qwen3": ("self_attn.o_proj", "mlp.down_proj"),
    "phi": ("self_attn.dense", "mlp.fc2"),
}
"""What reads the heads' outputs, and what reads the neurons."""


def made(family: str, seed: int = 1, **options: Any) -> PreTrainedModel:
    head = "causal-lm" if family in DECODERS else "sequence-classification"
    return tiny_model(family, head, num_layers=BLOCKS, hidden_size=WIDTH, num_heads=8, seed=seed, **options).double()


def blocks(model: nn.Module, family: str) -> list[nn.Module]:
    """The blocks, known by what their attention's output is called."""
    names = [name for name, _ in model.named_modules() if name.endswith("." + OUTPUTS[family][0])]
    return [model.get_submodule(name.removesuffix("." + OUTPUTS[family][0])) for name in names]


def group_size(family: str) -> int:
    return 2 if family in GROUPED else 1


def silence(module: Any, args: tuple[Tensor, ...], features: list[int]) -> tuple[Tensor, ...]:
    states = args[0].clone()
    states[..., features] = 0
    return (states, *args[1:])


def masked(model: PreTrainedModel, family: str, heads: list[list[int]], neurons: list[list[int]]) -> PreTrainedModel:
    """The whole model, in which the outputs of some heads (groups of them) and neurons are always 0."""
    whole = copy.deepcopy(model)
    for block, gone_heads, gone_neurons in zip(blocks(whole, family), heads, neurons, strict=True):
        size = SIZE * group_size(family)
        features = [feature for head in gone_heads for feature in range(head * size, (head + 1) * size)]
        attention, feed_forward = OUTPUTS[family]
        block.get_submodule(attention).register_forward_pre_hook(partial(silence, features=features))
        block.get_submodule(feed_forward).register_forward_pre_hook(partial(silence, features=gone_neurons))
    return whole


HEADS = [[1], [0], [3]]
NEURONS = [[3, 7, 20], [0, 1, 2], [5, 9, 63]]
