"""What a metric is worth without reading the text: the value of the best constant answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from layerdistill.core.types import IGNORED_LABEL
from layerdistill.evaluate.config import LOWER_IS_BETTER
from layerdistill.evaluate.metrics import METRICS, UndefinedMetric, perplexity


def chance_levels(names: Sequence[str], task: str, dataset: Dataset) -> dict[str, float]:
    """Return each metric's value for the best answer that does not depend on the text.

    Classes: the best single class (for accuracy the majority's share). Several labels: see `constant_labels`. Numbers:
    the mean; correlations with a constant count as 0. Language models: the split's own unigram distribution, which no
    model could know, so that the level is a lenient one. Perplexity of dependent windows counts scored tokens only.
    """
    if task == "causal-lm":
        return {name: unigram_perplexity(dataset) for name in names if name == "perplexity"}
    column = "labels" if "labels" in dataset.column_names else "label"
    labels = np.asarray(dataset[column][:])
    if task == "regression":
        constants = [np.full(labels.shape, labels.mean())]
    elif task == "multi-label-classification":
        labels = labels.astype(np.int64)
        constants = [np.tile(answer, (len(labels), 1)) for answer in constant_labels(labels)]
    else:
        constants = [np.full(labels.shape, label) for label in np.unique(labels)]
    levels: dict[str, float] = {}
    for name in names:
        values = [value_of(name, constant, labels) for constant in constants]
        levels[name] = min(values) if name in LOWER_IS_BETTER else max(values)
    return levels


def constant_labels(labels: np.ndarray) -> list[np.ndarray]:
    """Return the constant answers `(labels,)` of which one is best by each metric of `labels`, `(examples, labels)`.

    By accuracy, the most frequent row. By macro-F1, every label: a label that is never given has an F1 of 0. By
    micro-F1, the k most frequent labels for some k: with n_j examples of label j among N, k labels have
    F1 = 2 sum_j n_j / (N k + all that there are), which is largest with the largest n_j.
    """
    rows, counts = np.unique(labels, axis=0, return_counts=True)
    given = labels.sum(axis=0)
    order = np.argsort(-given, kind="stable")
    by_number = 2 * given[order].cumsum() / (len(labels) * np.arange(1, len(given) + 1) + max(given.sum(), 1))
    frequent = np.zeros_like(given)
    frequent[order[: by_number.argmax() + 1]] = 1
    return [rows[counts.argmax()], np.ones_like(given), frequent]


def value_of(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return a metric of predictions, 0 for a correlation that is undefined because they are constant."""
    try:
        return METRICS[name](predictions, labels)
    except UndefinedMetric:
        return 0.0


def unigram_perplexity(dataset: Dataset) -> float:
    """Return the perplexity of the split's predicted tokens under their own frequencies."""
    counts: Counter[int] = Counter()
    column = "labels" if "labels" in dataset.column_names else "input_ids"
    for labels in dataset[column]:
        counts.update(label for label in labels[1:] if label != IGNORED_LABEL)
    tokens = np.array(list(counts.values()), dtype=np.float64)
    return perplexity(-tokens * np.log(tokens / tokens.sum()), tokens)
