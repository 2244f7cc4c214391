"""How many examples, tokens and labels an optimisation step has over all its micro-batches and processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerdistill.core.types import IGNORED_LABEL, Batch, Unit

UNITS: tuple[Unit, ...] = ("example", "token", "decoder_token", "label", "batch")


def count_units(batch: Batch, task: str) -> Tensor:
    """Return the counts of one micro-batch in the order of UNITS, float64 `(units,)`.

    Decoder tokens are those of `signals.batch_masks`: a decoder reads its labels, a classifier's its encoder's input.
    """
    tokens, labels = batch["input_ids"], batch.get("labels")
    mask = batch.get("attention_mask")
    attended = mask.sum() if mask is not None else torch.tensor(tokens.numel())
    labelled = torch.tensor(len(tokens))
    decoded = attended
    if labels is not None and task == "causal-lm":
        labelled = (labels[:, 1:] != IGNORED_LABEL).sum()
    if "decoder_attention_mask" in batch:
        decoded = batch["decoder_attention_mask"].sum()
    elif labels is not None and labels.ndim == 2 and task != "multi-label-classification":
        decoded = (labels != IGNORED_LABEL).sum()
    counts = [len(tokens), attended, decoded, labelled, 1]
    return torch.stack([torch.as_tensor(count, dtype=torch.float64, device=tokens.device) for count in counts])


def sum_units(batches: Sequence[Batch], task: str) -> Tensor:
    """Return the counts of several micro-batches together, float64 `(units,)`."""
    return torch.stack([count_units(batch, task) for batch in batches]).sum(dim=0)


def count_of(counts: Tensor, unit: Unit) -> Tensor:
    """Return one count, at least 1 so that a step without any such unit divides by nothing wrong."""
    return counts[UNITS.index(unit)].clamp(min=1.0)
