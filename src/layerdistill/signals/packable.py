"""Whether a model says the same of texts that are packed into rows: tried on texts of its first such batch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Hashable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef, StackName, Tap
from layerdistill.models import Stack, evaluating, find_stacks, positions
from layerdistill.signals.hooks import capture
from layerdistill.signals.packing import Packing, pack_texts, texts_to_try, worthwhile_packing
from layerdistill.signals.padding_free import packed_blocks
from layerdistill.signals.taps import tapped

logger = logging.getLogger(__name__)

LOGITS = 64
"""Most tokens whose logits are compared."""

AGREES = 1e-4
"""Difference, as a share of a token's states, that is rounding in float32: 1e-6 was seen in a MiniLM of six blocks."""

LARGEST_COPY = 2**33
"""Bytes of the float32 copy on which a model of 16 bits is tried: its own rounding would hide texts that leak."""

DROPS_BLOCKS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Fields of configurations with the probability that a block is left out in training."""

_PROBLEMS: WeakKeyDictionary[nn.Module, dict[Hashable, str | None]] = WeakKeyDictionary()
"""Model -> what was asked of it: the whole or its base, through which blocks, where -> what `packing_problem` found."""


def packing_of(
    model: PreTrainedModel,
    whole: bool,
    inputs: Mapping[str, Any],
    masks: Mapping[StackName, Tensor],
    labels: Tensor | None,
    taps: Iterable[Tap] = (),
) -> Packing | None:
    """Return how the blocks of `model` are to run on a batch without its padding, None where they run on it as it is.

    The model, or where not `whole` its base, is to be called with `inputs` and read at `taps`. None is the answer for a
    batch with little padding, a model with an encoder and a decoder, an architecture that does not allow it, and blocks
    that training may leave out or run again (LayerDrop, activation checkpointing).
    """
    stack, mask = find_stacks(model).get(""), masks.get("")
    if stack is None or mask is None or mask.dim() != 2 or not calls_all_blocks_once(model, stack):
        return None
    packing = worthwhile_packing(mask, labels, positions(model.config))
    if packing is None:
        return None
    known, taps = _PROBLEMS.setdefault(model, {}), frozenset(taps)
    # Blocks are replaced while some methods train.
    asked = (whole, taps, tuple(ref(block) for block in stack.blocks))
    if asked not in known:
        lengths = mask.ne(0).sum(1).tolist()
        chosen = torch.tensor(texts_to_try(lengths, positions(model.config)), device=mask.device)
        try:
            known[asked] = packing_problem(model, whole, inputs, mask, chosen, taps)
        except torch.OutOfMemoryError:
            return None  # which says nothing of the model: another batch may be tried
        if known[asked] is not None:
            logger.info("%s runs on padding: %s.", type(model).__name__, known[asked])
    return packing if known[asked] is None else None


def calls_all_blocks_once(model: PreTrainedModel, stack: Stack) -> bool:
    """Return whether a training step runs every block, and the backward pass none of them again, without our hooks."""
    parts = stack.block_path.split(".")
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in (*around, *stack.blocks))
    drops = model.training and any(getattr(model.config, name, None) for name in DROPS_BLOCKS)
    return not drops and not (checkpoints and torch.is_grad_enabled())


def kept_apart_problem(block: nn.Module) -> str | None:
    """Return why a block cannot run on packed rows, if a module of it says so, whatever a try of new weights shows."""
    for module in block.modules():
        if isinstance(getattr(module, "positions", None), nn.Embedding):
            return "compact blocks have positions of their own"
        if isinstance(module, nn.Conv1d | nn.Conv2d) and max(module.kernel_size) > 1:
            return "its blocks have convolutions, which reach into the next text"
    return None


@torch.no_grad()
def packing_problem(
    model: PreTrainedModel,
    whole: bool,
    inputs: Mapping[str, Any],
    mask: Tensor,
    chosen: Tensor,
    taps: Iterable[Tap] = (),
) -> str | None:
    """Return a sentence when `model` (its base where not `whole`) says something else of packed texts, else None.

    It is run twice on the texts `chosen` of a batch, in eval mode and without autocast, and left as it was; one of 16
    bits is copied in float32 for that. Compared are the last hidden states, what flows through `taps`, and logits.
    """
    if known := next(filter(None, map(kept_apart_problem, find_stacks(model)[""].blocks)), None):
        return known
    weights = list(model.parameters())
    narrow = any(weight.dtype.itemsize < 4 for weight in weights)
    if narrow and 4 * sum(weight.numel() for weight in weights) > LARGEST_COPY:
        return "it is too large to be tried in float32"
    some = {
        name: value[chosen] if isinstance(value, Tensor) and value.shape[:1] == mask.shape[:1] else value
        for name, value in inputs.items()
    }
    tokens = int(mask[chosen].ne(0).sum())
    packing = pack_texts(mask[chosen], tokens + (tokens == mask.shape[1]))  # one row, but not as wide as the batch
    try:
        tried = copy.deepcopy(model).float() if narrow else model
        with evaluating(tried), torch.autocast(mask.device.type, enabled=False):
            padded, packed = (_said(tried, whole, some, packing, used, taps) for used in (None, packing))
        for what, alone in padded.items():
            sizes = alone.norm(dim=-1)
            difference = ((alone - packed[what]).norm(dim=-1) / sizes.clamp(min=float(sizes.max()) / 100)).max()
            if not float(difference) <= AGREES:
                return f"{what} change by {float(difference):.2g} in packed rows"
    except torch.OutOfMemoryError:
        raise
    except (UserError, RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"its blocks do not run on packed rows ({type(error).__name__}: {error})"
    return None


def _said(
    model: PreTrainedModel,
    whole: bool,
    inputs: Mapping[str, Any],
    packing: Packing,
    used: Packing | None,
    taps: Iterable[Tap],
) -> dict[str, Tensor]:
    """Return the last layer and `taps` at real tokens, and logits, if any, of texts or of some of these tokens."""
    stack = find_stacks(model)[""]
    last = LayerRef("", stack.depth)
    with packed_blocks(stack, used), capture(model, [last]) as hidden, tapped(model, taps) as places:
        output = model(**inputs) if whole else model.base_model(**inputs)
    found = {"hidden states": hidden[last], **{f"{tap.side} of {tap.module}": places[tap] for tap in places}}
    found = {name: packing.tokens(tensor) for name, tensor in found.items()}
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        per_token = packing.is_laid_out(logits)
        found["logits"] = logits.flatten(0, 1).index_select(0, packing.real[-LOGITS:]) if per_token else logits
    return found
