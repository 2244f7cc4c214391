"""Blocks of another kind: a bottleneck around a few narrow blocks of the model's own class.

This file is copied beside a saved student that needs it, so it imports nothing but torch and transformers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

KIND = "compact"


class CompactBlock(nn.Module):
    """`x + up(G(relu(down(x))))` in the place of a block; G is a stack of narrow blocks of the class of that block.

    Source: ISKD (Musaeus and van der Goot, COLING 2025, https://aclanthology.org/2025.coling-main.440), the released
    code. Called like the block that it replaces. The model's mask goes to the inner blocks as it is; they get rotary
    tables of their own head size, and each has its own layer of the key-value cache. Deviations: the authors' inner
    blocks turn the mask round a second time, do without a cache, and count positions from 0 whatever the padding.
    """

    def __init__(
        self,
        inner: PreTrainedModel,
        blocks: Sequence[nn.Module],
        host_config: PretrainedConfig,
        description: Mapping[str, Any],
    ) -> None:
        """`inner` is a narrow model of the host's class of which the parts are taken, `blocks` those of its blocks."""
        super().__init__()
        config = inner.config
        parts = dict(inner.named_modules())
        holder = parts[description["blocks"].rpartition(".")[0]]
        outside = {name: part for name, part in parts.items() if not name.startswith(description["blocks"] + ".")}
        self.down = nn.Linear(host_config.hidden_size, config.hidden_size)
        self.activation = nn.ReLU() if description["activation"] == "relu" else nn.Identity()
        rows = description["positions"]
        self.positions = nn.Embedding(rows, config.hidden_size) if rows else None
        self.first_position = description["first_position"]
        self.dropout = nn.Dropout(description["dropout"])
        self.relative = getattr(holder, "rel_embeddings", None)
        self.relative_norm = getattr(holder, "LayerNorm", None) if self.relative is not None else None
        self.rotary = next((part for name, part in outside.items() if name.endswith("rotary_emb")), None)
        self.blocks = nn.ModuleList(blocks)
        self.norm = parts[description["norm"]] if description["norm"] else nn.Identity()
        self.up = nn.Linear(config.hidden_size, host_config.hidden_size)
        self.inner_config, self.host_config = config, host_config
        self.rotary_options: dict[str, Any] = {}
        if self.rotary is not None and "layer_type" in inspect.signature(self.rotary.forward).parameters:
            self.rotary_options["layer_type"] = config.layer_types[0]
        # Models read such words off their blocks, to choose the mask that a block gets.
        for name, value in vars(blocks[0]).items():
            if isinstance(value, str) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the host's block would: hidden states `(batch, seq, width)`, in a tuple where it returns one."""
        if not args:
            args = (kwargs.pop("hidden_states"),)
        states, rest = args[0], args[1:]
        self.inner_config._attn_implementation = self.host_config._attn_implementation
        cache = next((value for value in (*rest, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is not None:
            self._make_room(cache)
        hidden = self.activation(self.down(states))
        position_ids = self._position_ids(states, kwargs.get("position_ids"), cache)
        if self.positions is not None:
            # OPT counts padding on the left as position -1.
            hidden = hidden + self.positions(position_ids.clamp(min=0))
        hidden = self.dropout(hidden)
        if self.rotary is not None:
            kwargs["position_embeddings"] = self.rotary(hidden, position_ids, **self.rotary_options)
        if self.relative is not None:
            table = self.relative.weight
            kwargs["rel_embeddings"] = table if self.relative_norm is None else self.relative_norm(table)
        further: tuple[Any, ...] | None = None
        for block in self.blocks:
            output = block(hidden, *rest, **kwargs)
            hidden, further = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        output = states + self.up(self.norm(hidden))
        return output if further is None else (output, *further)

    def use_cache_layers(self, layers: Sequence[int]) -> None:
        """Give each inner block the number of its layer in the key-value cache."""
        self.cache_layers = tuple(layers)
        for block, layer in zip(self.blocks, layers, strict=True):
            parts: list[Any] = [module for module in block.modules() if hasattr(module, "layer_idx")]
            for part in parts:
                part.layer_idx = layer

    def _make_room(self, cache: Cache) -> None:
        """Add layers to a cache that was made from the configuration, which knows nothing of the inner blocks.

        They are of the kind (whole, sliding, static) of the replaced block's, which is empty when this happens.
        """
        cache = getattr(cache, "self_attention_cache", cache)
        if cache.layer_class_to_replicate is None:
            while len(cache.layers) <= self.cache_layers[-1]:
                cache.layers.append(copy.deepcopy(cache.layers[self.cache_layers[0]]))

    def _position_ids(self, states: Tensor, given: Tensor | None, cache: Cache | None) -> Tensor:
        """Return the position ids that the model passes on, else those of a text without padding on the left."""
        if given is not None:
            return given
        past = 0 if cache is None else cache.get_seq_length(self.cache_layers[0])
        start = past + self.first_position
        return torch.arange(start, start + states.shape[1], device=states.device).unsqueeze(0)


def rebuild(model: PreTrainedModel, description: Mapping[str, Any]) -> None:
    """Put compact blocks, with new weights, in the place of the blocks `description["replaced"]` (from 0) of `model`.

    `description` holds, besides: `blocks` and `norm`, the paths of the list of blocks and of the final norm (or None)
    in the base model; `config`, fields of the inner blocks' configuration that differ from the model's; `per_layer`,
    the fields with an entry per block; `num_inner_blocks`; `activation` (`relu` or `none`); `positions`, the rows of a
    position table of its own (0: none), of which `first_position` is the first row that is used; and `dropout`.
    """
    for number in description["replaced"]:
        put_block(model, description, number, build_block(model, description, number))


def build_block(model: PreTrainedModel, description: Mapping[str, Any], number: int) -> CompactBlock:
    """Return a new compact block for the place of block `number` (from 0), on the default device, in the default dtype.

    The projections are Xavier-uniform with zero biases, all else is as the model's class initialises it.
    """
    base: Any = model.base_model
    fields = {key: value for key, value in base.config.to_dict().items() if key not in ("layerdistill", "auto_map")}
    fields |= description["config"]
    count = description["num_inner_blocks"]
    for key in description["per_layer"]:
        fields[key] = [fields[key][number]] * (count + 1)
    config = type(base.config).from_dict(fields)
    config._attn_implementation = base.config._attn_implementation
    inner = _stock_class(base)(config)
    made = list(inner.get_submodule(description["blocks"]))
    # ModernBERT's first block lacks a norm, because its embeddings end in one; what enters a compact block does not.
    alike = made[0].state_dict().keys() == made[1].state_dict().keys()
    block = CompactBlock(inner, made[:count] if alike else made[1:], base.config, description)
    for projection in (block.down, block.up):
        nn.init.xavier_uniform_(projection.weight)
        nn.init.zeros_(projection.bias)
    if block.positions is not None:
        nn.init.normal_(block.positions.weight, std=getattr(config, "initializer_range", 0.02))
    return block


def put_block(model: PreTrainedModel, description: Mapping[str, Any], number: int, block: nn.Module) -> nn.Module:
    """Put `block` in the place of block `number` (from 0) of `model`, and return what was there."""
    blocks: Any = model.base_model.get_submodule(description["blocks"])
    before = blocks[number]
    blocks[number] = block
    number_cache_layers(blocks)
    return before


def number_cache_layers(blocks: Sequence[nn.Module]) -> None:
    """Give every inner block a layer of the cache: the first of each the replaced block's own, the others new ones."""
    free = len(blocks)
    for number, block in enumerate(blocks):
        # While a compact block learns it may lie inside another module, beside the block that it replaces.
        for compact in [module for module in block.modules() if isinstance(module, CompactBlock)]:
            more = len(compact.blocks) - 1
            compact.use_cache_layers([number, *range(free, free + more)])
            free += more


def _stock_class(model: PreTrainedModel) -> Any:
    """Return the class of transformers that a model is of, or that its class was made of."""
    return next(base for base in type(model).__mro__ if base.__module__.startswith("transformers."))
