"""Whether a model says the same of texts that are packed into rows: tried once, on texts of its first such batch."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef, StackName, Tap
from layerdistill.models import Stack, find_stacks
from layerdistill.signals.hooks import capture
from layerdistill.signals.packing import Packing, pack_texts, worthwhile_packing
from layerdistill.signals.padding_free import packed_blocks
from layerdistill.signals.taps import tapped

logger = logging.getLogger(__name__)

TEXTS = 4
"""Texts that a model is tried on."""

AGREES = 1e-4
"""Difference, as a share over all numbers together, that is rounding: 1e-6 was seen in a MiniLM of six blocks."""

COARSELY_AGREES = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The same for 16 bits, where 1e-2 and 1e-3 were seen. Texts that see each other change by far more."""

DROPS_BLOCKS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Fields of configurations with the probability that a block is left out in training."""

_PROBLEMS: WeakKeyDictionary[nn.Module, dict[Hashable, str | None]] = WeakKeyDictionary()
"""Model -> what was asked of it: of which class, through which blocks, where -> what `packing_problem` found."""


def packing_of(
    model: PreTrainedModel,
    called: nn.Module,
    inputs: Mapping[str, Any],
    masks: Mapping[StackName, Tensor],
    labels: Tensor | None,
    taps: Iterable[Tap] = (),
) -> Packing | None:
    """Return how the blocks of `model` are to run on a batch without its padding, None where they run on it as it is.

    `called`, the model or its base, is to be called with `inputs` and read at `taps`. None is the answer for a batch
    with little padding, a model with an encoder and a decoder, an architecture that does not allow it, blocks that
    count positions themselves (compact ones with a table of their own), and those that training may leave out or run
    again (LayerDrop, activation checkpointing).
    """
    stack, mask = find_stacks(model).get(""), masks.get("")
    if stack is None or mask is None or mask.dim() != 2:
        return None
    packing = worthwhile_packing(mask, labels)
    if packing is None or not calls_all_blocks_once(model) or any(map(counts_positions, stack.blocks)):
        return None
    known, taps = _PROBLEMS.setdefault(model, {}), frozenset(taps)
    # Blocks are replaced while some methods train.
    asked = (type(called), taps, tuple(ref(block) for block in stack.blocks))
    if asked not in known:
        known[asked] = packing_problem(model, stack, called, inputs, mask, taps)
        if known[asked] is not None:
            logger.info("%s runs on padding: %s.", type(model).__name__, known[asked])
    return packing if known[asked] is None else None


def calls_all_blocks_once(model: PreTrainedModel) -> bool:
    """Return whether a training step runs every block, and the backward pass none of them again, without our hooks."""
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    drops = model.training and any(getattr(model.config, name, None) for name in DROPS_BLOCKS)
    return not drops and not (checkpoints and torch.is_grad_enabled())


def counts_positions(block: nn.Module) -> bool:
    """Return whether a compact block in `block` has positions of its own: a new table hardly shows in a try."""
    return any(isinstance(getattr(module, "positions", None), nn.Embedding) for module in block.modules())


@torch.no_grad()
def packing_problem(
    model: PreTrainedModel,
    stack: Stack,
    called: nn.Module,
    inputs: Mapping[str, Any],
    mask: Tensor,
    taps: Iterable[Tap] = (),
) -> str | None:
    """Return a sentence when `called` (the model or its base) says something else of packed texts, else None.

    It is run twice on four texts of a batch, in eval mode and without autocast, and left as it was; hidden states of
    real tokens, what flows through `taps` and, where there are any, logits are compared.
    """
    chosen = texts_to_try(mask)
    some = {
        name: value[chosen] if isinstance(value, Tensor) and len(value) == len(mask) else value
        for name, value in inputs.items()
    }
    packing = pack_texts(mask[chosen], int(mask[chosen].ne(0).sum()))
    modes = {module: module.training for module in called.modules()}
    called.eval()
    try:
        with torch.autocast(mask.device.type, enabled=False):
            padded, packed = (_said(model, stack, called, some, packing, used, taps) for used in (None, packing))
    except (UserError, RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"its blocks do not run on packed rows ({type(error).__name__}: {error})"
    finally:
        for module, training in modes.items():
            module.training = training
    for (what, alone), together in zip(padded.items(), packed.values(), strict=True):
        difference = float((alone.double() - together.double()).norm() / alone.double().norm().clamp(min=1e-30))
        if not difference <= COARSELY_AGREES.get(alone.dtype, AGREES):
            return f"{what} change by {difference:.2g} in packed rows"
    return None


def texts_to_try(mask: Tensor) -> Tensor:
    """Return the numbers of up to four texts of a batch, from the shortest to the longest."""
    order = mask.ne(0).sum(1).argsort(stable=True)
    steps = torch.linspace(0, len(order) - 1, min(TEXTS, len(order))).round().long()
    return order[steps.to(order.device)]


def _said(
    model: PreTrainedModel,
    stack: Stack,
    called: nn.Module,
    inputs: Mapping[str, Any],
    packing: Packing,
    used: Packing | None,
    taps: Iterable[Tap],
) -> dict[str, Tensor]:
    """Return the last layer and `taps` at real tokens, and the logits of real tokens or of texts if there are any."""
    last = LayerRef("", stack.depth)
    with packed_blocks(stack, used), capture(model, [last]) as hidden, tapped(model, taps) as places:
        output = called(**inputs)
    logits = getattr(output, "logits", None)
    found = {"hidden states": hidden[last], **{f"{tap.side} of {tap.module}": places[tap] for tap in places}}
    if isinstance(logits, Tensor):
        found["logits"] = logits
    per_text = {"logits"} if isinstance(logits, Tensor) and not packing.is_laid_out(logits) else set()
    return {name: tensor if name in per_text else packing.tokens(tensor) for name, tensor in found.items()}
