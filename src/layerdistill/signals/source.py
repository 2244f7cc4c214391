"""What models say about a batch: one way to run them, for the student (with its graph) and the teacher (without)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.core.types import IGNORED_LABEL, Batch, LayerRef, Signal, StackName, Tap
from layerdistill.models import find_stacks, unwrap
from layerdistill.signals.hooks import Captured, capture
from layerdistill.signals.laid_out import LaidOut
from layerdistill.signals.packable import packing_of
from layerdistill.signals.padding_free import packed_blocks
from layerdistill.signals.stop import stopping_above
from layerdistill.signals.taps import stack_of, tapped

_NOT_INPUTS = frozenset({"labels", "use_cache", "return_dict", "output_hidden_states", "output_attentions"})


def student_signal(
    model: nn.Module,
    batch: Batch,
    layers: Iterable[LayerRef],
    taps: Iterable[Tap] = (),
    logits: bool = True,
    padding_free: bool = False,
) -> Signal:
    """Return the student's logits (unless they are not wanted), `layers` and `taps` with their graph."""
    return run_model(model, batch, layers, logits=logits, taps=taps, padding_free=padding_free)


def run_model(
    model: nn.Module,
    batch: Batch,
    layers: Iterable[LayerRef],
    logits: bool,
    taps: Iterable[Tap] = (),
    padding_free: bool = False,
) -> Signal:
    """Run `model` once on `batch` and return its signal; labels are not passed, so it computes no loss of its own.

    Without `logits` only the base model is run, without a graph no block above the highest layer, and nothing at all
    when no layer and no tap is wanted either. `masks`
    holds `attention_mask` (ones if there is none); in an encoder-decoder `masks["decoder"]` is
    `decoder_attention_mask`, else where `labels` of decoder positions are not -100, else the encoder's (a classifier
    decodes its own input). With `padding_free` the blocks run on packed texts where that saves work and the
    architecture allows it; what is said of padding then means nothing.
    """
    layers, taps = tuple(layers), tuple(taps)
    inner = unwrap(model)
    inputs = _inputs(inner, batch)
    masks = batch_masks(inner, batch)
    if not layers and not logits and not taps:
        return Signal(None, {}, masks)
    # A base model is not called through the wrapper, and only its class knows what a decoder gets for labels.
    whole = logits or model is not inner or (inner.config.is_encoder_decoder and "decoder_input_ids" not in inputs)
    called = model if whole else inner.base_model
    accepted = _accepted(inner if whole else inner.base_model, inputs)
    packing = packing_of(inner, whole, accepted, masks, batch.get("labels"), taps) if padding_free else None
    output = None
    no_further = not (logits or taps or torch.is_grad_enabled())
    stop = stopping_above(inner, layers) if no_further else nullcontext()
    with (
        packed_blocks(find_stacks(inner).get(""), packing),
        capture(model, layers) as hidden,
        tapped(inner, taps) as places,
        stop,
    ):
        output = called(**accepted)
    said = _logits(inner, output) if logits else None
    if packing is None:
        found = {layer: restore_padding(tensor, masks[layer.stack]) for layer, tensor in _all(hidden, layers)}
        tensors = {tap: restore_padding(tensor, masks[stack_of(inner, tap)]) for tap, tensor in places.items()}
        return Signal(said, found, masks, tensors)
    rows = {layer: packing.tokens(tensor) for layer, tensor in _all(hidden, layers)}
    laid_out = LaidOut(rows, masks, {layer: tensor for layer, tensor in hidden.items() if packing.is_laid_out(tensor)})
    unpacked = {id(tensor): packing.unpack(tensor) for tensor in places.values()}  # several taps may be one tensor
    return Signal(said, laid_out, masks, {tap: unpacked[id(tensor)] for tap, tensor in places.items()}, rows=rows)


def batch_masks(model: nn.Module, batch: Batch) -> dict[StackName, Tensor]:
    """Return the mask `(batch, seq)` of each stack of `model`: 1 on real tokens, 0 on padding."""
    ids = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.long)
    if "encoder" not in find_stacks(model):
        return {"": mask}
    labels = batch.get("labels")
    if "decoder_attention_mask" in batch:
        decoder = batch["decoder_attention_mask"]
    elif "decoder_input_ids" in batch and (labels is None or labels.shape != batch["decoder_input_ids"].shape):
        decoder = torch.ones_like(batch["decoder_input_ids"])
    elif labels is not None and _decodes_labels(unwrap(model)):
        decoder = (labels != IGNORED_LABEL).long()
    else:
        decoder = mask
    return {"encoder": mask, "decoder": decoder}


def restore_padding(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return hidden states as `(batch, seq, hidden)`, with zeros on padding, where a model dropped the padding.

    Kernels without padding give `(tokens, hidden)` for the tokens of all texts one after another; others pass through.
    Raises UserError for any other shape.
    """
    if hidden.dim() == 3 and hidden.shape[:2] == mask.shape:
        return hidden
    places = mask.flatten().nonzero().squeeze(1)
    if hidden.dim() == 2 and len(hidden) == len(places):
        padded = hidden.new_zeros(mask.numel(), hidden.shape[1]).index_copy(0, places, hidden)
        return padded.view(*mask.shape, hidden.shape[1])
    raise UserError(
        f"captured hidden states have the shape {tuple(hidden.shape)}, which does not fit a batch of "
        f"{tuple(mask.shape)} tokens: this architecture lays its hidden states out in a way that is not supported."
    )


def _inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """Return the batch without labels; a decoder that is trained on labels gets its input ids made of them."""
    inputs = {name: value for name, value in batch.items() if name not in _NOT_INPUTS}
    if "labels" in batch and _decodes_labels(model) and "decoder_input_ids" not in inputs:
        shift: Any = model.prepare_decoder_input_ids_from_labels
        inputs["decoder_input_ids"] = shift(labels=batch["labels"])
    return inputs


def _decodes_labels(model: PreTrainedModel) -> bool:
    return model.config.is_encoder_decoder and hasattr(model, "prepare_decoder_input_ids_from_labels")


def _accepted(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return the inputs that the model's forward names, with caches for generation turned off."""
    names = inspect.signature(type(model).forward).parameters
    accepted: dict[str, Any] = {name: value for name, value in inputs.items() if name in names}
    if "use_cache" in names:
        accepted["use_cache"] = False
    return accepted


def _all(hidden: Captured, layers: tuple[LayerRef, ...]) -> list[tuple[LayerRef, Tensor]]:
    """Return every layer asked for, so that one that was not run is an error here rather than a gap."""
    return [(layer, hidden[layer]) for layer in layers]


def _logits(model: PreTrainedModel, output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        raise UserError(
            f"{type(model).__name__} gives no logits: load it with a head for the task, not as a base model."
        )
    return logits
