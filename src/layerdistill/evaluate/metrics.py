"""Metrics as functions of (predictions, labels); scikit-learn and scipy compute them, so nothing is downloaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from scipy import stats
from sklearn import metrics as sklearn_metrics

from layerdistill.core.errors import LayerDistillError, UserError
from layerdistill.evaluate.config import f1_problems, metric_problems

Metric = Callable[[np.ndarray, np.ndarray], float]
"""Takes predictions and labels, `(examples,)` or multi-label `(examples, labels)`; see `perplexity` for its own two."""


class UndefinedMetric(LayerDistillError):
    """The metric has no value on these predictions; the message says why."""


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of examples predicted right; of multi-label examples, all labels have to be right."""
    return float(sklearn_metrics.accuracy_score(labels, predictions))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return F1 of label 1 (two classes) or micro-averaged over all decisions (multi-label); 0 without any 1.

    Raises UserError when there are more than two classes.
    """
    if labels.ndim == 2:
        return float(sklearn_metrics.f1_score(labels, predictions, average="micro", zero_division=0.0))
    if problems := f1_problems(("f1",), int(max(predictions.max(), labels.max())) + 1):
        raise UserError(*problems)
    return float(sklearn_metrics.f1_score(labels, predictions, pos_label=1, zero_division=0.0))


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the unweighted mean of F1 over the classes that occur in labels or predictions.

    Multi-label: over all labels, where one that neither occurs nor is predicted counts as 0.
    """
    return float(sklearn_metrics.f1_score(labels, predictions, average="macro", zero_division=0.0))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return Matthews' correlation; by convention 0 when all labels, or all predictions, are the same class."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(sklearn_metrics.matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return Pearson's correlation; raises UndefinedMetric when either side is constant."""
    _need_spread(predictions, labels)
    return _defined(float(stats.pearsonr(predictions, labels).statistic))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return Spearman's rank correlation, ties sharing ranks; raises UndefinedMetric when either side is constant."""
    _need_spread(predictions, labels)
    return _defined(float(stats.spearmanr(predictions, labels).statistic))


def mse(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean squared error, in the labels' unit squared."""
    return float(sklearn_metrics.mean_squared_error(labels, predictions))


def perplexity(nll: np.ndarray, tokens: np.ndarray) -> float:
    """Return exp(total nll / total tokens) from each example's sum of nats and its number of predicted tokens.

    Tokens weigh the same whatever the length of their example. Raises UserError when no token was predicted, and
    UndefinedMetric when the value exceeds what a float can hold.
    """
    total = int(tokens.sum())
    if total == 0:
        raise UserError(
            "perplexity needs at least one predicted token, but every label is -100 or has nothing before it."
        )
    nats = float(nll.sum(dtype=np.float64)) / total
    try:
        return math.exp(nats)
    except OverflowError as error:
        raise UndefinedMetric(
            f"the mean loss is {nats:.1f} nats per token, and its exponential exceeds a float"
        ) from error


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "mse": mse,
    "perplexity": perplexity,
}


def compute_metrics(
    names: Sequence[str], task: str, predictions: pa.Table
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Return the metrics of a predictions table (see `predictions.py`), and why the undefined ones have no value.

    An undefined metric is None, which JSON can hold and nobody mistakes for a score: a correlation with a constant is
    not 0. Raises UserError when a name does not fit the task, the table is empty, or a prediction is not finite.
    """
    problems = metric_problems(names, task)
    if problems:
        raise UserError(*problems)
    if predictions.num_rows == 0:
        raise UserError("there is nothing to evaluate: the split has no examples.")
    _refuse_not_finite(predictions)
    given, expected = _arrays(task, predictions)
    if task == "sequence-classification" and (problems := f1_problems(names, len(predictions["logits"][0]))):
        raise UserError(*problems)
    values: dict[str, float | None] = {}
    undefined: dict[str, str] = {}
    for name in names:
        try:
            values[name] = METRICS[name](given, expected)
        except UndefinedMetric as reason:
            values[name], undefined[name] = None, str(reason)
    return values, undefined


def _arrays(task: str, predictions: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    names = ("nll", "tokens") if task == "causal-lm" else ("prediction", "label")
    first, second = (_array(predictions[name]) for name in names)
    return first, second


def _array(column: pa.ChunkedArray) -> np.ndarray:
    """Return `(rows,)` for numbers and `(rows, width)` for lists, which all have the same length."""
    whole = column.combine_chunks()
    if pa.types.is_list(column.type):
        return whole.flatten().to_numpy().reshape(len(column), -1)
    return whole.to_numpy()


def _refuse_not_finite(predictions: pa.Table) -> None:
    column = "nll" if "nll" in predictions.column_names else "logits"
    values = _array(predictions[column]).reshape(predictions.num_rows, -1)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        first = predictions["example_id"][int(bad[0])].as_py()
        raise UserError(
            f"the model's output is NaN or infinite for {len(bad)} of {predictions.num_rows} examples (the first is "
            f"example {first!r}), so it has no {'perplexity' if column == 'nll' else 'metrics'}. Training has diverged "
            "or the dtype is too narrow: lower the learning rate, or use float32 or bfloat16 in place of float16."
        )


def _need_spread(predictions: np.ndarray, labels: np.ndarray) -> None:
    if len(labels) < 2:
        raise UndefinedMetric("a correlation needs at least two examples, and there is one")
    for what, values in (("predictions", predictions), ("labels", labels)):
        if np.ptp(values) == 0:
            raise UndefinedMetric(f"a correlation needs values that differ, and all {what} are {values[0]:g}")


def _defined(value: float) -> float:
    if not math.isfinite(value):
        raise UndefinedMetric("the values differ by less than floating point can resolve")
    return value
