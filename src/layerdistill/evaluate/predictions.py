"""The predictions table: one row per example in the dataset's order, kept for paired statistics.

Columns: `example_id`, then `label`, `prediction`, `logits` (list of float), or, for causal-lm, `nll` (the sum of nats
over the predicted tokens) and `tokens` (how many they are).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from layerdistill.core.errors import UserError
from layerdistill.core.files import explained_disk_errors, write_bytes


def classification_table(example_ids: Sequence[Any], labels: Sequence[Any], logits: np.ndarray) -> pa.Table:
    """Return the table of single-label predictions: the class of the highest of `logits`, `(examples, classes)`.

    Raises UserError when a label is missing or is not a class of the model.
    """
    classes = logits.shape[1]
    for example_id, label in zip(example_ids, labels, strict=True):
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
            raise UserError(
                f"example {example_id!r} has label {label!r}, but the model's classes are 0 to {classes - 1}. Evaluate "
                "a split that has labels (in GLUE test splits they are -1), with a model made for this task."
            )
    return _table(example_ids, pa.array(labels, pa.int64()), pa.array(logits.argmax(axis=1), pa.int64()), logits)


def multi_label_table(example_ids: Sequence[Any], labels: Sequence[Any], logits: np.ndarray) -> pa.Table:
    """Return the table of multi-label predictions: 1 where `logits`, `(examples, labels)`, exceeds 0 (probability 0.5).

    Raises UserError when the labels of an example are not one 0 or 1 per output.
    """
    width = logits.shape[1]
    for example_id, label in zip(example_ids, labels, strict=True):
        if not isinstance(label, list) or len(label) != width or any(value not in (0, 1) for value in label):
            raise UserError(
                f"example {example_id!r} has labels {label!r}, but the model has {width} outputs: a multi-label "
                f"example has a list of {width} zeros and ones."
            )
    decisions = (logits > 0).astype(np.int64)
    whole = np.asarray(labels, dtype=np.int64)
    return _table(example_ids, _lists(whole, pa.int64()), _lists(decisions, pa.int64()), logits)


def regression_table(example_ids: Sequence[Any], labels: Sequence[Any], logits: np.ndarray) -> pa.Table:
    """Return the table of regression predictions: `logits`, `(examples, 1)`, as they are.

    Raises UserError when the model has more than one output or a label is missing or not finite.
    """
    if logits.shape[1] != 1:
        raise UserError(
            f"a regression model has one output, but this one has {logits.shape[1]}: load it with num_labels=1, or "
            "evaluate it as sequence-classification."
        )
    for example_id, label in zip(example_ids, labels, strict=True):
        if not isinstance(label, int | float) or not np.isfinite(label):
            raise UserError(f"example {example_id!r} has label {label!r}, but regression needs a finite number.")
    return _table(example_ids, pa.array(labels, pa.float64()), pa.array(logits[:, 0].astype(np.float64)), logits)


def language_table(example_ids: Sequence[Any], nll: np.ndarray, tokens: np.ndarray) -> pa.Table:
    """Return the table of a language model: sums of nats, `(examples,)`, and numbers of predicted tokens."""
    return pa.table(
        {
            "example_id": pa.array(example_ids),
            "nll": pa.array(nll, pa.float64()),
            "tokens": pa.array(tokens, pa.int64()),
        }
    )


LABELLED_TABLES = {
    "sequence-classification": classification_table,
    "multi-label-classification": multi_label_table,
    "regression": regression_table,
}


def save_predictions(table: pa.Table, path: Path) -> None:
    """Write a predictions table as parquet, atomically; raises UserError when the disk refuses it."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    with explained_disk_errors(path.name, path.parent):
        write_bytes(path, sink.getvalue().to_pybytes())


def _table(example_ids: Sequence[Any], labels: pa.Array, predictions: pa.Array, logits: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "example_id": pa.array(example_ids),
            "label": labels,
            "prediction": predictions,
            "logits": _lists(logits, pa.from_numpy_dtype(logits.dtype)),
        }
    )


def _lists(rows: np.ndarray, dtype: pa.DataType) -> pa.Array:
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.reshape(-1), dtype))
