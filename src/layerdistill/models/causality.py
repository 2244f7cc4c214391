"""Whether a model keeps its rules: no token sees a later one, and padding changes nothing. Cheap, on random tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.models.eval_mode import evaluating
from layerdistill.models.structure import unwrap

TOKENS = 8
"""Length of the random text."""

CHANGED = 5
"""The token (from 0) that is changed."""

TOLERANCE = 1e-4
"""Changes below this share of the largest hidden state are rounding."""


def causality_problem(model: nn.Module) -> str | None:
    """Return a sentence when changing a token changes the hidden states of tokens before it, else None.

    Every model that reads in both directions has this problem, so ask only of one that must not. The model is run
    twice on 8 random tokens, in eval mode, and left as it was; the reference is its largest hidden state.
    """
    ids = _random_ids(model)
    other = ids.clone()
    other[:, CHANGED] = ids[:, CHANGED - 1]
    states, changed = _states(model, ids), _states(model, other)
    difference = _share(states[:, :CHANGED] - changed[:, :CHANGED], states)
    if difference <= TOLERANCE:
        return None
    return (
        f"changing token {CHANGED} changes the hidden states of the tokens before it (by {difference:.2g} of the "
        "largest): a token sees those that follow it"
    )


def padding_problem(model: nn.Module) -> str | None:
    """Return a sentence when padding on the right, which the mask tells, changes the real tokens' hidden states."""
    ids = _random_ids(model)
    mask = torch.ones_like(ids)
    mask[:, CHANGED:] = 0
    alone = _states(model, ids[:, :CHANGED], mask[:, :CHANGED])
    difference = _share(_states(model, ids, mask)[:, :CHANGED] - alone, alone)
    if difference <= TOLERANCE:
        return None
    return (
        f"padding changes the hidden states of real tokens (by {difference:.2g} of the largest): the attention mask "
        "does not reach the blocks"
    )


def _random_ids(model: nn.Module) -> Tensor:
    """Return `(1, 8)` token ids, each at most once; 0 to 7 (often special) only in the smallest vocabularies."""
    size = unwrap(model).config.get_text_config().vocab_size
    if size < TOKENS:
        raise UserError(f"The model has {size} token ids; a check of its blocks takes {TOKENS}.")
    draws = torch.randperm(max(size - TOKENS, TOKENS), generator=torch.Generator().manual_seed(0))[:TOKENS]
    return (draws + min(TOKENS, size - len(draws))).clamp(max=size - 1).unsqueeze(0)


@torch.no_grad()
def _states(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    base = unwrap(model).base_model
    place = next(base.parameters()).device
    mask = torch.ones_like(ids) if mask is None else mask
    with evaluating(model):
        return base(input_ids=ids.to(place), attention_mask=mask.to(place))[0].float()


def _share(difference: Tensor, whole: Tensor) -> float:
    return float(difference.abs().max() / whole.abs().max())
