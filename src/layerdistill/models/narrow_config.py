"""Make the configuration of a narrowed model say its sizes, so that its checkpoint opens again."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.models.fields import INTERMEDIATE_FIELDS, StackFields, stack_fields
from layerdistill.models.modeling_narrow import KIND, blocks_of, head_sizes, layout_of, neuron_count, rebuild
from layerdistill.models.own_code import own_class, stock_class
from layerdistill.models.shrink import build_on_meta

_REFUSALS = (UserError, ValueError, TypeError, StrictDataclassError)


def describe_in_config(model: PreTrainedModel) -> bool:
    """Write a narrowed model's sizes into its configuration, and return whether its class makes a model of that.

    Stock is what the class makes, on the meta device, with the same shapes, and the same numbers in its attention, as
    `model` has. Where no configuration does that (the head size is the hidden size divided by the number of heads),
    the number of heads stays as it was and `config.layerdistill` gets the description that `modeling_narrow.rebuild`
    reads; its class becomes the one that is rebuilt so. Raises UserError when even that does not make the same shapes,
    and for a class that transformers does not have.
    """
    config = model.config
    build = stock_class(model)
    vars(config).pop("layerdistill", None)
    fields = stack_fields(config)[""]
    block = blocks_of(model)[0]
    layout = layout_of(block)
    assert layout is not None, "blocks_of returns those that have one"
    sizes = head_sizes(block, layout.attention)
    neurons = {name: neuron_count(block, layout.feed_forward) for name in _neuron_field(fields)}
    heads = {fields.heads: sizes.queries} if fields.heads else {}
    heads |= {fields.kv_heads: sizes.groups} if fields.kv_heads else {}
    # Phi's classes read a head_dim that its configuration does not declare.
    for changes in (heads | neurons, heads | neurons | {fields.head_size or "head_dim": sizes.features}):
        if _is_made_of(model, build, changes):
            _write(fields.section, changes)
            model.__class__ = build
            return True
    description = {"kind": KIND, "num_attention_heads": sizes.queries, "num_key_value_heads": sizes.groups}
    if not _is_made_of(model, build, neurons, description):
        raise UserError(
            f"{type(config).__name__} cannot say the sizes of {type(model).__name__} with fewer heads and neurons; "
            "this architecture is not supported."
        )
    _write(fields.section, neurons)
    _write(config, {"layerdistill": description})
    # The name of its class says under which names transformers saves and reads tensors (GPT-NeoX's head has two).
    model.__class__ = own_class(build, KIND)
    return False


def _neuron_field(fields: StackFields) -> tuple[str, ...]:
    """Return the name of the feed-forward width, also where it is empty (GPT-2); none if there is no such field."""
    empty = tuple(name for name in INTERMEDIATE_FIELDS if name in vars(fields.section))
    return (fields.intermediate or empty)[:1]


def _is_made_of(
    model: PreTrainedModel,
    build: type[PreTrainedModel],
    changes: dict[str, Any],
    description: dict[str, Any] | None = None,
) -> bool:
    """Return whether `build` makes the shapes and head counts of `model` out of its configuration with `changes`.

    With a `description` the model is rebuilt by it afterwards, as it is when its checkpoint is opened.
    """
    try:
        built = build_on_meta(_changed(model.config, changes), build)
        if description is not None:
            rebuild(built, description)
    except _REFUSALS:
        return False
    return _shapes(built) == _shapes(model) and _attention_numbers(built) == _attention_numbers(model)


def _changed(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """Return a configuration with other values, checked by its class as it is when it is read from a file."""
    section = data = config.to_dict()
    for key in stack_fields(config)[""].path:
        section = section[key]
    section.update(changes)
    changed = type(config).from_dict(data)
    changed._attn_implementation = config._attn_implementation
    return changed


def _write(config: PretrainedConfig, changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        setattr(config, key, value)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _attention_numbers(model: nn.Module) -> list[dict[str, Any]]:
    """Return the plain numbers with which the attention of every block computes."""
    found = []
    for block in blocks_of(model):
        layout = layout_of(block)
        assert layout is not None, "blocks_of returns those that have one"
        attention = vars(block.get_submodule(layout.attention.module))
        kept = {key: value for key, value in attention.items() if not key.startswith("_") and key != "training"}
        found.append({key: value for key, value in kept.items() if isinstance(value, bool | int | float | str)})
    return found
