"""Find the blocks, the final norm, the embeddings and the head of a model of any architecture, by structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.core.types import StackName
from layerdistill.models.fields import depths_from_config, stack_fields, widths_from_config
from layerdistill.models.overrides import NOT_THE_FINAL_NORM


@dataclass(frozen=True)
class Stack:
    """One stack of blocks.

    `block_path` is the dotted path of the `ModuleList` in the unwrapped model and `block_names[k]` that of block k + 1.
    `final_norm` is the norm applied to the output of the last block, at `final_norm_path`, or None. `width` is the
    hidden size, `depth` the number of blocks.
    """

    name: StackName
    blocks: tuple[nn.Module, ...]
    block_path: str
    block_names: tuple[str, ...]
    final_norm: nn.Module | None
    final_norm_path: str | None
    width: int
    depth: int


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model inside DataParallel, DistributedDataParallel, `torch.compile` or PEFT wrappers.

    Raises UserError when there is none.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        peft_base = getattr(inner, "get_base_model", None)
        below = [peft_base() if callable(peft_base) else None]  # type: ignore[operator]
        below += [getattr(inner, name, None) for name in ("module", "_orig_mod")]
        wrapped = next((module for module in below if isinstance(module, nn.Module)), None)
        if wrapped is None:
            raise UserError(
                f"{type(model).__name__} is not a Hugging Face model and wraps none: pass a PreTrainedModel of "
                "transformers, bare or inside DistributedDataParallel, torch.compile or a PEFT model."
            )
        inner = wrapped
    return inner


def find_stacks(model: nn.Module, blocks: str | Mapping[str, str] | None = None) -> dict[StackName, Stack]:
    """Return the stacks of `model`: one named `""`, or `encoder` and `decoder`.

    A stack is the outermost `ModuleList` of blocks of one class whose length is the layer count of the configuration.
    `blocks` overrules the search with the dotted path of the list, or `{"encoder": path, "decoder": path}`.
    Raises UserError, naming the class, when no such list or more than one is found.
    """
    model = unwrap(model)
    if blocks:
        return {name: _stack(model, place) for name, place in _places(model, dict(_given(model, blocks))).items()}
    known = _FOUND.get(model)
    if known is None or known.looks != _looks(model, known.places):
        places = _places(model, _search(model))
        known = _FOUND[model] = _Known(places, _looks(model, places))
    return {name: _stack(model, place) for name, place in known.places.items()}


@dataclass(frozen=True)
class _Place:
    """Where a stack is in its model."""

    name: StackName
    block_path: str
    final_norm_path: str | None
    width: int


@dataclass(frozen=True)
class _Known:
    """Where the stacks of a model were found, and what it looked like then."""

    places: dict[StackName, _Place]
    looks: Any


_FOUND: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
"""A search takes a millisecond, and every forward pass asks several times. No module is held here."""


def _looks(model: PreTrainedModel, places: Mapping[StackName, _Place]) -> Any:
    """Return what changes when blocks are added, taken out or replaced by others; None where they are gone."""
    try:
        kinds = [[type(block) for block in _stack(model, place).blocks] for place in places.values()]
    except AttributeError:
        return None
    return dict(vars(model.config)), kinds


def _places(model: PreTrainedModel, paths: Mapping[StackName, str]) -> dict[StackName, _Place]:
    width_of = widths_from_config(model.config)
    found: dict[StackName, _Place] = {}
    for name, path in paths.items():
        width = width_of.get(name) or next(iter(width_of.values()))
        found[name] = _Place(name, path, _final_norm_path(model, path, name, width), width)
    return found


def _stack(model: PreTrainedModel, place: _Place) -> Stack:
    modules = tuple(model.get_submodule(place.block_path).children())
    return Stack(
        name=place.name,
        blocks=modules,
        block_path=place.block_path,
        block_names=tuple(f"{place.block_path}.{number}" for number in range(len(modules))),
        final_norm=None if place.final_norm_path is None else model.get_submodule(place.final_norm_path),
        final_norm_path=place.final_norm_path,
        width=place.width,
        depth=len(modules),
    )


def depths(model: nn.Module) -> dict[StackName, int]:
    """Return the number of blocks of each stack of a loaded model."""
    return {name: stack.depth for name, stack in find_stacks(model).items()}


def widths(model: nn.Module) -> dict[StackName, int]:
    """Return the hidden size of each stack of a loaded model."""
    return {name: stack.width for name, stack in find_stacks(model).items()}


def find_embeddings(model: nn.Module) -> nn.Module:
    """Return the token embedding, the module that maps `(batch, seq)` ids to vectors."""
    model = unwrap(model)
    try:
        return model.get_input_embeddings()
    except NotImplementedError as error:
        raise UserError(f"{type(model).__name__} has no token embedding that transformers can name.") from error


def find_head(model: nn.Module) -> nn.Module | None:
    """Return what makes logits of hidden states: the output embeddings of a language model, or the classifier.

    A classifier of several modules in a row (a pooler, then a matrix) is answered with the last; None in a base model.
    """
    model = unwrap(model)
    output_embeddings = model.get_output_embeddings()
    if output_embeddings is not None:
        return output_embeddings
    outside = [
        child for child in model.children() if child is not model.base_model and any(True for _ in child.parameters())
    ]
    return outside[-1] if outside and model.base_model is not model else None


def _given(model: PreTrainedModel, blocks: str | Mapping[str, str]) -> list[tuple[StackName, str]]:
    named: Mapping[str, str] = {"": blocks} if isinstance(blocks, str) else blocks
    modules = dict(model.named_modules())
    found: list[tuple[StackName, str]] = []
    for name, path in named.items():
        if name not in ("", "encoder", "decoder") or not isinstance(modules.get(path), nn.ModuleList):
            lists = [known for known, module in modules.items() if isinstance(module, nn.ModuleList)]
            raise UserError(
                f"blocks={blocks!r} does not name a ModuleList of {type(model).__name__}. Its lists are: "
                f"{', '.join(lists) or 'none'}. Stacks are named '', 'encoder' or 'decoder'."
            )
        found.append((name, path))  # type: ignore[arg-type]
    return found


def _search(model: PreTrainedModel) -> dict[StackName, str]:
    """Return the path of the block list of each stack."""
    fields = stack_fields(model.config)
    depth = depths_from_config(model.config)
    if "encoder" not in depth:
        # The towers of a multi-modal model may be as deep as its language model.
        root = model.get_decoder() if fields[""].path else model
        return {"": _block_list(model, root, depth[""])}
    encoder, decoder = model.get_encoder(), model.get_decoder()
    if decoder is model or decoder is encoder or any(module is encoder for module in decoder.modules()):
        # An encoder taken out of an encoder-decoder (T5EncoderModel) has one stack.
        return {"": _block_list(model, encoder, depth["encoder"])}
    return {
        "encoder": _block_list(model, encoder, depth["encoder"]),
        "decoder": _block_list(model, decoder, depth["decoder"]),
    }


def _block_list(model: PreTrainedModel, root: nn.Module, depth: int) -> str:
    """Return the path in `model` of the list of `depth` blocks below `root`."""
    prefix = next(path for path, module in model.named_modules() if module is root)
    lists = {
        f"{prefix}.{path}" if prefix else path: module
        for path, module in root.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and _look_like_blocks(module)
    }
    # Blocks may hold lists of the same length themselves: experts, or the narrow blocks of a compact one.
    outside = {path for path in lists if not any(path.startswith(other + ".") for other in lists)}
    one_class = {path for path in outside if len({type(block) for block in lists[path]}) == 1}
    # Hybrid architectures alternate blocks of several classes; they are taken only where no list is uniform.
    outermost = list(one_class or outside)
    if len(outermost) == 1:
        return outermost[0]
    found = f"{len(outermost)} of them ({', '.join(sorted(outermost))})" if outermost else "none"
    raise UserError(
        f"The blocks of {type(model).__name__} cannot be told from its structure: looked for one ModuleList of {depth} "
        f"blocks of one class (the layer count of its configuration) and found {found}. Pass the dotted path of the "
        "list with blocks='path.to.list' (two stacks: blocks={'encoder': ..., 'decoder': ...})."
    )


def _look_like_blocks(modules: nn.ModuleList) -> bool:
    """Return whether every module holds at least two matrices, as a block does and a norm or a projection does not."""
    return all(sum(p.dim() >= 2 for p in block.parameters()) >= 2 for block in modules)


def _final_norm_path(model: PreTrainedModel, block_path: str, stack: StackName, width: int) -> str | None:
    """Return the path of the norm that stands beside the block list, or beside the module that holds the list.

    Where several do (BLOOM, mBART: one is for the embeddings), the one registered last is meant.
    """
    base = next(path for path, module in model.named_modules() if module is model.base_model)
    parent = block_path.rpartition(".")[0]
    while True:
        owner = model.get_submodule(parent)
        norms = [
            name
            for name, child in owner.named_children()
            if "norm" in type(child).__name__.lower()
            and all(p.shape == (width,) for p in child.parameters())
            and not type(owner).__name__.startswith(NOT_THE_FINAL_NORM.get(name, ("-",)))
        ]
        if norms:
            return f"{parent}.{norms[-1]}" if parent else norms[-1]
        # One stack's norm may stand in the base model; two stacks share that, so theirs can only be their own.
        if parent == base or not parent or stack:
            return None
        parent = parent.rpartition(".")[0]
