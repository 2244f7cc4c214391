"""Remove blocks from a loaded model in place, so that what is left is what its class makes of its configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.models.fields import stack_fields
from layerdistill.models.shrink import build_on_meta, shrink_config
from layerdistill.models.structure import find_stacks, unwrap

_PLAIN = (int, float, str, type(None))


@dataclass(frozen=True)
class _Edit:
    """What a block's place, or the number of blocks, decides: an attribute or a module of `owner`."""

    owner: nn.Module
    name: str
    value: Any


def remove_blocks(model: nn.Module, blocks: Iterable[int]) -> None:
    """Take the numbered blocks (0-based) out of a model with one stack; the others keep their parameters.

    The configuration follows (depth, layer types, windows, every list with an entry per block), and so does whatever
    the class derives from it: the number of each attention's layer, attention types, the norm that ModernBERT's first
    block lacks. Those are found by building the class on the meta device with both configurations and comparing, so
    the result equals `from_pretrained` of its saved folder and `make_student(model, copy_map=[the blocks left])`.
    Raises UserError, before anything is changed, for a block that is not there, for all blocks, for a model with an
    encoder and a decoder, and where a block left cannot stand where it would stand.
    """
    inner = unwrap(model)
    stacks = find_stacks(inner)
    if "" not in stacks:
        raise UserError(f"{type(inner).__name__} has an encoder and a decoder; blocks are removed from one stack only.")
    stack, gone = stacks[""], set(blocks)
    kept = [block for block in range(stack.depth) if block not in gone]
    if not kept or len(kept) + len(gone) != stack.depth:
        raise UserError(
            f"blocks to remove are {sorted(gone)}, but must be numbers from 0 to {stack.depth - 1} and leave at least "
            f"one of the {stack.depth} blocks."
        )
    config = shrink_config(inner.config, copy_map=kept)
    unchanged = shrink_config(inner.config, copy_map=range(stack.depth))
    edits = list(_edits(inner, config, stack.block_path, kept))
    for edit in edits:
        setattr(edit.owner, edit.name, edit.value)
    listed: Any = inner.get_submodule(stack.block_path)
    for block in sorted(gone, reverse=True):
        del listed[block]
    for held in _configs(inner):
        _follow(held, unchanged, config)


def _edits(model: PreTrainedModel, config: PretrainedConfig, path: str, kept: list[int]) -> Iterator[_Edit]:
    """Yield what has to change in the modules that stay, given the configuration to come."""
    build: Any = type(model)
    before = build_on_meta(copy.deepcopy(model.config), build)
    after = build_on_meta(copy.deepcopy(config), build)
    for name, new in after.named_modules():
        if not name.startswith(path + "."):
            yield from _attributes(model.get_submodule(name), before.get_submodule(name), new)
    for number, source in enumerate(kept):
        block = model.get_submodule(f"{path}.{source}")
        old, new = before.get_submodule(f"{path}.{source}"), after.get_submodule(f"{path}.{number}")
        edits = list(_block_edits(block, old, new))
        replaced = [edit for edit in edits if isinstance(edit.value, nn.Module)]
        _refuse_misfit(block, new, replaced, source, number)
        yield from edits


def _block_edits(block: nn.Module, old: nn.Module, new: nn.Module) -> Iterator[_Edit]:
    """Yield what makes of `block`, which was built like `old`, a block built like `new`."""
    yield from _attributes(block, old, new)
    for name, made in new.named_children():
        mine, was = getattr(block, name, None), getattr(old, name, None)
        if mine is None or was is None:
            continue  # `_refuse_misfit` sees what it would hold
        if type(made) is not type(was):
            yield _Edit(block, name, made)
        else:
            yield from _block_edits(mine, was, made)


def _attributes(real: nn.Module, old: nn.Module, new: nn.Module) -> Iterator[_Edit]:
    """Yield the numbers, words and lists of them that the class made different."""
    for name, value in vars(new).items():
        was = vars(old).get(name)
        if not name.startswith("_") and _is_plain(value) and _is_plain(was) and was != value:
            yield _Edit(real, name, copy.copy(value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(entry, _PLAIN) for entry in value)
    return isinstance(value, _PLAIN)


def _refuse_misfit(block: nn.Module, new: nn.Module, replaced: list[_Edit], source: int, number: int) -> None:
    """Raise UserError unless `block`, with modules replaced, holds the tensors of a block built at its new place."""
    dropped = {id(part) for edit in replaced for part in getattr(edit.owner, edit.name).parameters()}
    shapes = {name: part.shape for name, part in block.named_parameters() if id(part) not in dropped}
    wanted = {name: part.shape for name, part in new.named_parameters()}
    if shapes != wanted:
        raise UserError(
            f"Block {source} cannot become block {number}: blocks of {type(block).__name__} are built differently by "
            f"their place ({', '.join(sorted(set(shapes) ^ set(wanted))[:3]) or 'other shapes'}). Remove another block."
        )


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Return every configuration object of the model's kind that its modules hold, each once."""
    held = [model.config, *(vars(module).get("config") for module in model.modules())]
    return list({id(config): config for config in held if isinstance(config, PretrainedConfig)}.values())


def _follow(held: PretrainedConfig, unchanged: PretrainedConfig, config: PretrainedConfig) -> None:
    """Give a configuration, or the text section that a module holds, the fields that the smaller one changed."""
    before, after = (vars(stack_fields(given)[""].section) for given in (unchanged, config))
    section = stack_fields(held)[""].section if type(held) is type(config) else held
    if type(section) is not type(stack_fields(config)[""].section):
        return
    for name, value in after.items():
        if before.get(name) != value:
            # Not setattr: it checks each field against others that are yet to change.
            vars(section)[name] = copy.deepcopy(value)
