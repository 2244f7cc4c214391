"""A model with a part of its vocabulary: the same blocks, the kept rows of embeddings and head, renumbered ids."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.core.seeds import seeded
from layerdistill.models.eval_mode import evaluating
from layerdistill.models.structure import unwrap

PROBED = 8
"""Token ids, spread over the vocabulary, on which a trimmed model must say what the whole one says."""

AGREES = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest difference, as a share of the largest output, that rounding may make; in 16 bits COARSELY_AGREES."""

COARSELY_AGREES = 0.05


def token_ids_named(config: PretrainedConfig) -> set[int]:
    """Return the token ids that a configuration names: padding, begin and end of text, and so on."""
    found: set[int] = set()
    for section in _sections(config):
        for name, value in vars(section).items():
            if name.endswith("_token_id"):
                found |= {number for number in _listed(value) if number >= 0}
    return found


def trim_config(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """Return the configuration of a model of which only the token ids `kept` are left, renumbered 0, 1, ...

    An id that it names and that is not kept becomes None.
    """
    trimmed = copy.deepcopy(config)
    rows = config.get_text_config().vocab_size
    new = {old: number for number, old in enumerate(kept)}
    for section in _sections(trimmed):
        if getattr(section, "vocab_size", None) == rows:
            section.vocab_size = len(kept)
        _renumber(section, new)
    return trimmed


def trim_model(model: nn.Module, kept: Sequence[int]) -> PreTrainedModel:
    """Return a model that reads the id i as `model` reads `kept[i]` and whose logits are those of the kept tokens.

    Every tensor that has a row (or an entry) for each token keeps those of `kept`, exactly; embeddings and heads that
    are tied stay tied. All others are shared with `model`, of the same dtype and on the same device, so train no more
    than one of the two. Raises UserError for an architecture in which ids mean more than a row of a table.
    """
    whole = unwrap(model)
    model_class: type[Any] = type(whole)
    with seeded(0, "trimmed"):  # every number that is drawn here is replaced below
        trimmed: PreTrainedModel = model_class(trim_config(whole.config, kept))
    trimmed = trimmed.to(whole.device)  # type: ignore[arg-type]
    index = torch.tensor(kept, device=whole.device)
    sources, targets = _tensors(whole), _tensors(trimmed)
    if differing := sorted(sources.keys() ^ targets.keys()):
        raise UserError(
            f"student.vocabulary is 'trimmed', but this {type(whole).__name__} is not what its class makes of its "
            f"configuration ({differing[0]} is in one of the two only). Merge adapters and save the model first, or "
            "use vocabulary: full."
        )
    for name, target in targets.items():
        source = sources[name]
        axes = [axis for axis in range(source.dim()) if source.shape[axis] != target.shape[axis]]
        target.data = source.data.index_select(axes[0], index) if axes else source.data
        target.requires_grad_(source.requires_grad)
    if getattr(whole, "generation_config", None) is not None:
        trimmed.generation_config = copy.deepcopy(whole.generation_config)
        _renumber(trimmed.generation_config, {old: number for number, old in enumerate(kept)})
    trimmed.train(whole.training)
    _check(whole, trimmed, index)
    return trimmed


def _sections(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Return a configuration and all those inside it."""
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return [config, *(section for value in inner for section in _sections(value))]


def _renumber(section: Any, new: Mapping[int, int]) -> None:
    """Bring the token ids that a model's or a generation's configuration names into the new numbers."""
    for name, value in list(vars(section).items()):
        if name.endswith("_token_id") and value is not None:
            numbers = [new.get(number, None if number >= 0 else number) for number in _listed(value)]
            left = [number for number in numbers if number is not None]
            setattr(section, name, (left or None) if isinstance(value, list | tuple) else numbers[0])
        elif name in ("suppress_tokens", "begin_suppress_tokens") and value is not None:
            setattr(section, name, [new[number] for number in value if number in new])
        elif name in ("bad_words_ids", "force_words_ids") and value is not None:
            setattr(section, name, _renumbered_words(value, new) or None)
        elif name == "sequence_bias" and value is not None:
            pairs = list(value.items()) if isinstance(value, Mapping) else value
            kept = [[_renumbered_words([word], new), bias] for word, bias in pairs]
            setattr(section, name, [[words[0], bias] for words, bias in kept if words] or None)
        elif name == "forced_decoder_ids" and value is not None:
            setattr(section, name, [[place, new[token]] for place, token in value if token in new] or None)


def _renumbered_words(words: Sequence[Any], new: Mapping[int, int]) -> list[Any]:
    """Return the words, lists of ids or lists of such lists, whose ids all have new numbers."""
    found = []
    for word in words:
        if word and isinstance(word[0], list | tuple):
            if choice := _renumbered_words(word, new):
                found.append(choice)
        elif new.keys() >= set(word):
            found.append([new[number] for number in word])
    return found


def _listed(value: Any) -> list[int]:
    """Return the ids in a field that may hold none, one or several."""
    several = value if isinstance(value, list | tuple) else [value]
    return [number for number in several if isinstance(number, int)]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, also those that are not saved; tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


@torch.no_grad()
def _check(whole: PreTrainedModel, trimmed: PreTrainedModel, index: Tensor) -> None:
    """Raise UserError unless both models say the same about a few tokens."""
    new = torch.linspace(0, len(index) - 1, PROBED, device=index.device).long()
    end = getattr(trimmed.config, "eos_token_id", None)
    if isinstance(end, int) and end >= 0:  # BART classifies by the end of the text
        new = torch.cat([new[new != end], new.new_tensor([end])])
    said, found = (_said(model, ids.unsqueeze(0)) for model, ids in ((whole, index[new]), (trimmed, new)))
    said = said.index_select(-1, index) if said.shape != found.shape else said
    allowed = AGREES.get(said.dtype, COARSELY_AGREES) * float(said.abs().max())
    if not float((said - found).abs().max()) <= allowed:
        raise UserError(
            f"student.vocabulary is 'trimmed', but {type(whole).__name__} does more with token ids than look up rows "
            "of its embedding (tables for each layer, positions counted from an id), so that they cannot be "
            "renumbered. Use vocabulary: full."
        )


def _said(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return a model's logits, or the last hidden states of one without a head, in eval mode."""
    with evaluating(model):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
