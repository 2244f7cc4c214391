"""The loss on the labels, by task."""

from __future__ import annotations

from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import Batch, Mean, Unit
from layerdistill.matching.logits import binary_cross_entropy, cross_entropy, mean_squared_error, next_token_labels


def task_loss(task: str, logits: Tensor, batch: Batch) -> Mean:
    """Return the task's own loss: cross-entropy, binary cross-entropy, squared error, or next-token cross-entropy.

    `logits` is `(batch, classes)`, or `(batch, seq, vocab)` for causal-lm. Computed here rather than by the model, so
    that its count is known and gradient accumulation is exact. Raises UserError for a batch without labels.
    """
    if "labels" not in batch:
        raise UserError(
            f"The examples have no labels (they have {', '.join(batch)}), but the loss of {task} needs them."
        )
    labels = batch["labels"]
    if task == "causal-lm":
        return cross_entropy(logits, next_token_labels(labels))
    if task == "regression":
        return mean_squared_error(logits, labels)
    if task == "multi-label-classification":
        return binary_cross_entropy(logits, labels)
    return cross_entropy(logits, labels)


def label_unit(task: str) -> Unit:
    """Return what one labelled thing is in this task."""
    return "label" if task == "causal-lm" else "example"
