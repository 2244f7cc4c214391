"""Run a model over a dataset once, keep what it says about every example, and compute the metrics from that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EvalPrediction

from layerdistill.core.errors import UserError
from layerdistill.core.types import IGNORED_LABEL
from layerdistill.evaluate.config import metric_problems
from layerdistill.evaluate.inference import forward_inputs, inference, text_config
from layerdistill.evaluate.metrics import compute_metrics
from layerdistill.evaluate.predictions import LABELLED_TABLES, language_table

Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]
"""Makes padded tensors `(batch, seq)` of a list of rows."""

Answer = Callable[[list[int]], tuple[Mapping[str, Any], Tensor]]
"""Gives the collated batch and the logits of the rows with these numbers."""

LOGITS_BYTES = 2**29
"""A language-model forward is made small enough that its logits, at 4 bytes each, stay below 512 MiB."""

CHUNK_ELEMENTS = 2**24
"""Logits that are turned into log-probabilities at a time: 64 MiB in float32."""


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate_model` found; `undefined` says why a metric is None, `predictions` is described in its module."""

    metrics: dict[str, float | None]
    predictions: pa.Table
    undefined: dict[str, str] = field(default_factory=dict)


def evaluate_model(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    task: str,
    metrics: Sequence[str],
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> EvaluationResult:
    """Return the metrics and the per-example predictions of `model`: `predict`, then `scores`.

    Raises UserError for a metric that does not fit the task, before the model is run, and as `predict` does.
    """
    if problems := metric_problems(metrics, task):
        raise UserError(*problems)
    return scores(predict(model, dataset, collator, task, batch_size, device), task, metrics)


def scores(predictions: pa.Table, task: str, metrics: Sequence[str]) -> EvaluationResult:
    """Return the metrics of a table of predictions, and the table."""
    values, undefined = compute_metrics(metrics, task, predictions)
    return EvaluationResult(values, predictions, undefined)


def predict(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    task: str,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> pa.Table:
    """Return what `model`, which never sees a label, says of every example.

    `dataset` has the columns `input_ids`, `labels` (or `label`), whatever else `collator` wants, and `example_id` (else
    the row's number). For causal-lm the labels are the collated batch's, `(batch, seq)`, shifted here; -100 is skipped.
    Batches are formed by length,
    longest first, so that little padding is computed and a lack of memory shows at once; the table is in the dataset's
    order. A language-model batch may be smaller than `batch_size` (see `LOGITS_BYTES`). The model keeps its mode and
    place. Raises UserError for a column or label that does not fit, and for output that is not finite.
    """
    _check(dataset, task)
    rows = dataset.with_format(None)
    example_ids = rows["example_id"][:] if "example_id" in rows.column_names else list(range(len(rows)))
    lengths = _lengths(dataset)
    with inference(model, device) as place:
        answer = _answerer(model, rows, collator, place)
        if task == "causal-lm":
            token_limit = LOGITS_BYTES // (4 * text_config(model).vocab_size)
            nll, tokens = _predict_tokens(answer, _batches(lengths, batch_size, token_limit), len(rows))
            return language_table(example_ids, nll, tokens)
        logits = _classify(answer, _batches(lengths, batch_size))
    return LABELLED_TABLES[task](example_ids, rows[_label_column(rows)][:], logits)


def metrics_in_training(task: str, names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]] | None:
    """Return what transformers' Trainer calls as `compute_metrics`; None for language models, which report their loss.

    Metrics that are undefined on an evaluation are left out of its log line.
    """
    if task == "causal-lm":
        return None

    def compute(given: EvalPrediction) -> dict[str, float]:
        logits, labels = np.asarray(given.predictions), np.asarray(given.label_ids)
        if task == "multi-label-classification":
            labels = labels.astype(np.int64)
        table = LABELLED_TABLES[task](range(len(logits)), labels.tolist(), logits)
        values, _ = compute_metrics(names, task, table)
        return {name: value for name, value in values.items() if value is not None}

    return compute


def token_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's sum of -log p(next token), in nats `(batch,)` float64, and its number of predicted tokens.

    `logits` is `(batch, seq, vocab)`, `labels` `(batch, seq)`: position t predicts label t + 1; -100 is skipped. The
    log-softmax is taken in float32 (float64 stays float64), `CHUNK_ELEMENTS` logits at a time.
    """
    batch, seq, vocab = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    following = labels[:, 1:]
    step = max(1, CHUNK_ELEMENTS // (batch * vocab))
    total = torch.zeros(batch, dtype=torch.float64)
    with torch.autocast(logits.device.type, enabled=False):
        for start in range(0, seq - 1, step):
            target = following[:, start : start + step]
            piece = logits[:, start : start + target.shape[1]].to(wide)
            losses = F.cross_entropy(
                piece.reshape(-1, vocab), target.reshape(-1), ignore_index=IGNORED_LABEL, reduction="none"
            )
            total += losses.view(batch, -1).cpu().double().sum(dim=1)
    return total, (following != IGNORED_LABEL).sum(dim=1).cpu()


def _check(dataset: Dataset, task: str) -> None:
    problems = []
    if not isinstance(dataset, Dataset):
        raise UserError(f"the data to evaluate on has to be a datasets.Dataset, but is {type(dataset).__name__}.")
    columns = ", ".join(dataset.column_names)
    if "input_ids" not in dataset.column_names:
        problems.append(f"the data to evaluate on lacks input_ids, so it is not tokenised; it has {columns}.")
    if task != "causal-lm" and _label_column(dataset) not in dataset.column_names:
        problems.append(f"the data to evaluate on has no labels; it has {columns}.")
    if len(dataset) == 0:
        problems.append("there is nothing to evaluate: the split has no examples.")
    if problems:
        raise UserError(*problems)


def rows_at_once(dataset: Any, collator: Collator, task: str, tokenizer: Any, most: int) -> int:
    """Return how many rows a batch may hold: `most`, but of a language model what LOGITS_BYTES leaves, at least one."""
    if task != "causal-lm" or tokenizer is None:
        return most
    longest = max((dataset[row] for row in range(len(dataset))), key=lambda row: len(row["input_ids"]))
    positions = collator([longest])["input_ids"].shape[1]
    return max(1, min(most, LOGITS_BYTES // (4 * len(tokenizer) * positions)))


def _label_column(dataset: Dataset) -> str:
    return "labels" if "labels" in dataset.column_names else "label"


def _lengths(dataset: Dataset) -> np.ndarray:
    column = dataset.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
    return pc.list_value_length(column).to_numpy()


def _batches(lengths: np.ndarray, batch_size: int, token_limit: int | None = None) -> Iterator[list[int]]:
    """Yield row numbers, longest rows first; a batch keeps `rows x longest` within `token_limit`, or is one row."""
    order = np.argsort(-lengths, kind="stable").tolist()
    start = 0
    while start < len(order):
        size = batch_size
        if token_limit is not None:
            size = max(1, min(size, token_limit // max(1, int(lengths[order[start]]))))
        yield order[start : start + size]
        start += size


def _answerer(model: nn.Module, rows: Dataset, collator: Collator, place: torch.device) -> Answer:
    """Return the function that collates the rows of the given numbers and runs the model on them."""

    def answer(numbers: list[int]) -> tuple[Mapping[str, Any], Tensor]:
        columns = {name: values for name, values in rows[numbers].items() if name != "example_id"}
        batch = collator([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
        return batch, model(**forward_inputs(model, batch, place)).logits

    return answer


def _classify(answer: Answer, batches: Iterable[list[int]]) -> np.ndarray:
    """Return logits `(examples, outputs)` in the dataset's order, float32 (float64 stays float64)."""
    pieces: list[np.ndarray] = []
    order: list[int] = []
    for numbers in batches:
        _, logits = answer(numbers)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        pieces.append(wide.reshape(len(numbers), -1).cpu().numpy())
        order.extend(numbers)
    return np.concatenate(pieces)[np.argsort(order)]


def _predict_tokens(answer: Answer, batches: Iterable[list[int]], examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each example's sum of nats and number of predicted tokens, in the dataset's order."""
    nll = np.zeros(examples, dtype=np.float64)
    tokens = np.zeros(examples, dtype=np.int64)
    for numbers in batches:
        batch, logits = answer(numbers)
        if "labels" not in batch:
            raise UserError("the collator of a causal-lm evaluation has to give `labels`, with -100 on padding.")
        sums, counts = token_nll(logits, batch["labels"].to(logits.device))
        nll[numbers], tokens[numbers] = sums.numpy(), counts.numpy()
    return nll, tokens
