"""Metrics against their formulas, written out in float64, and where they have no value."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from layerdistill import evaluate
from layerdistill.core.errors import UserError
from layerdistill.evaluate.config import DEFAULT_METRICS, TASK_METRICS, EvaluationConfig, metric_problems
from layerdistill.evaluate.metrics import METRICS, UndefinedMetric, compute_metrics
from layerdistill.evaluate.predictions import (
    classification_table,
    language_table,
    multi_label_table,
    regression_table,
)

DRAW = np.random.default_rng(5)
BINARY = DRAW.integers(0, 2, 40), DRAW.integers(0, 2, 40)
CLASSES = DRAW.integers(0, 4, 60), DRAW.integers(0, 4, 60)
MULTI = DRAW.integers(0, 2, (30, 5)), DRAW.integers(0, 2, (30, 5))
REAL = DRAW.normal(size=50).round(1), DRAW.normal(size=50).round(1)


def f1_of(predicted: np.ndarray, true: np.ndarray) -> float:
    hits = float(np.sum((predicted == 1) & (true == 1)))
    wrong = float(np.sum(predicted != true))
    return 2 * hits / (2 * hits + wrong) if hits + wrong else 0.0


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    dx, dy = x - x.sum() / len(x), y - y.sum() / len(y)
    return float((dx * dy).sum() / math.sqrt((dx**2).sum() * (dy**2).sum()))


def average_ranks(x: np.ndarray) -> np.ndarray:
    return np.array([np.sum(x < value) + (np.sum(x == value) + 1) / 2 for value in x])


def test_binary_metrics() -> None:
    predicted, true = BINARY
    assert METRICS["accuracy"](*BINARY) == pytest.approx(np.mean(predicted == true), abs=1e-15)
    assert METRICS["f1"](*BINARY) == pytest.approx(f1_of(predicted, true), abs=1e-15)
    tp, tn = np.sum(predicted & true), np.sum((1 - predicted) & (1 - true))
    fp, fn = np.sum(predicted & (1 - true)), np.sum((1 - predicted) & true)
    phi = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert METRICS["matthews"](*BINARY) == pytest.approx(phi, abs=1e-14)


def test_multi_class_metrics() -> None:
    predicted, true = CLASSES
    per_class = [f1_of((predicted == c).astype(int), (true == c).astype(int)) for c in range(4)]
    assert METRICS["macro_f1"](*CLASSES) == pytest.approx(sum(per_class) / 4, abs=1e-15)
    # Matthews with K classes: the correlation of the two one-hot matrices, each column centred.
    x, y = np.eye(4)[predicted], np.eye(4)[true]
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert METRICS["matthews"](*CLASSES) == pytest.approx(expected, abs=1e-14)


def test_multi_label_metrics() -> None:
    predicted, true = MULTI
    assert METRICS["accuracy"](*MULTI) == sum(all(p == t) for p, t in zip(predicted, true, strict=True)) / 30
    assert METRICS["f1"](*MULTI) == pytest.approx(f1_of(predicted.ravel(), true.ravel()), abs=1e-15)
    each = [f1_of(predicted[:, k], true[:, k]) for k in range(5)]
    assert METRICS["macro_f1"](*MULTI) == pytest.approx(sum(each) / 5, abs=1e-15)


def test_regression_metrics() -> None:
    predicted, true = REAL
    assert METRICS["pearson"](*REAL) == pytest.approx(correlation(predicted, true), abs=1e-14)
    ranks = correlation(average_ranks(predicted), average_ranks(true))
    assert METRICS["spearman"](*REAL) == pytest.approx(ranks, abs=1e-14)
    assert METRICS["mse"](*REAL) == pytest.approx(((predicted - true) ** 2).sum() / 50, abs=1e-14)


def test_perplexity_weighs_tokens_not_examples() -> None:
    nll, tokens = np.array([2.0, 90.0, 0.0]), np.array([1, 30, 0])
    assert METRICS["perplexity"](nll, tokens) == pytest.approx(math.exp(92.0 / 31.0), rel=1e-14)


def test_one_class_only() -> None:
    zeros, mixed = np.zeros(4, int), np.array([0, 1, 0, 0])
    assert METRICS["matthews"](mixed, zeros) == 0.0
    assert METRICS["matthews"](zeros, mixed) == 0.0
    assert METRICS["f1"](zeros, zeros) == 0.0
    assert METRICS["f1"](zeros, mixed) == 0.0
    assert METRICS["accuracy"](zeros, zeros) == 1.0
    assert METRICS["macro_f1"](zeros, mixed) == pytest.approx((6 / 7) / 2)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_correlation_with_a_constant_is_none_with_a_reason(name: str) -> None:
    logits = np.full((5, 1), 0.25, dtype=np.float32)
    table = regression_table(list(range(5)), [0.0, 1.0, 2.0, 3.0, 4.0], logits)
    values, undefined = compute_metrics([name, "mse"], "regression", table)
    assert values[name] is None
    assert "all predictions are 0.25" in undefined[name]
    assert values["mse"] == pytest.approx(sum((0.25 - n) ** 2 for n in range(5)) / 5)
    with pytest.raises(UndefinedMetric, match="labels"):
        METRICS[name](np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    with pytest.raises(UndefinedMetric, match="two examples"):
        METRICS[name](np.array([1.0]), np.array([3.0]))


def test_perplexity_too_large_for_a_float_is_none() -> None:
    values, undefined = compute_metrics(
        ["perplexity"], "causal-lm", language_table([0], np.array([1e4]), np.array([2]))
    )
    assert values == {"perplexity": None}
    assert "5000.0 nats" in undefined["perplexity"]
    with pytest.raises(UserError, match="at least one predicted token"):
        compute_metrics(["perplexity"], "causal-lm", language_table([0], np.array([0.0]), np.array([0])))


def test_f1_of_three_classes_is_refused_even_where_only_two_occur() -> None:
    table = classification_table([0, 1], [0, 1], np.array([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]))
    with pytest.raises(UserError, match="macro_f1"):
        compute_metrics(["f1"], "sequence-classification", table)
    with pytest.raises(UserError, match="3 classes"):
        METRICS["f1"](np.array([0, 2]), np.array([0, 1]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_output_that_is_not_finite_is_refused(bad: float) -> None:
    table = classification_table(["a", "b"], [0, 1], np.array([[0.0, 1.0], [bad, 1.0]]))
    with pytest.raises(UserError, match=r"1 of 2 examples.*'b'"):
        compute_metrics(["accuracy"], "sequence-classification", table)
    with pytest.raises(UserError, match="NaN or infinite"):
        compute_metrics(["perplexity"], "causal-lm", language_table(["a"], np.array([bad]), np.array([3])))


@pytest.mark.parametrize(
    ("make", "labels", "logits", "message"),
    [
        (classification_table, [0, -1], [[0.0, 1.0]] * 2, "label -1"),
        (classification_table, [0, 2], [[0.0, 1.0]] * 2, "0 to 1"),
        (classification_table, [0, None], [[0.0, 1.0]] * 2, "label None"),
        (classification_table, [0, 0.5], [[0.0, 1.0]] * 2, "label 0.5"),
        (multi_label_table, [[1.0, 0.0], [1.0]], [[0.0, 1.0]] * 2, "2 outputs"),
        (multi_label_table, [[1.0, 0.0], [1.0, 2.0]], [[0.0, 1.0]] * 2, "zeros and ones"),
        (regression_table, [0.0, math.nan], [[0.0], [1.0]], "finite number"),
        (regression_table, [0.0, 1.0], [[0.0, 1.0]] * 2, "num_labels=1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(make, labels, logits, message) -> None:
    with pytest.raises(UserError, match=message):
        make(["x", "y"], labels, np.array(logits))


def test_names_and_tasks() -> None:
    assert set(METRICS) == {name for names in TASK_METRICS.values() for name in names}
    assert all(set(DEFAULT_METRICS[task]) <= set(TASK_METRICS[task]) for task in TASK_METRICS)
    assert EvaluationConfig().metrics_for("regression") == ["pearson", "spearman"]
    assert EvaluationConfig(metrics=["matthews"]).metrics_for("sequence-classification") == ["matthews"]
    with pytest.raises(UserError, match="does not fit the task regression"):
        EvaluationConfig(metrics=["accuracy"]).metrics_for("regression")
    assert "Did you mean 'causal-lm'" in metric_problems(None, "causal_lm")[0]
    with pytest.raises(ValueError, match="Did you mean 'accuracy'"):
        EvaluationConfig(metrics=["acuracy"])
    with pytest.raises(ValueError, match="at least one example"):
        EvaluationConfig(latency_batch_sizes=(0, 1))
    with pytest.raises(ValueError, match="list of metrics is empty"):
        EvaluationConfig(metrics=[])


def test_every_public_name_is_there() -> None:
    assert sorted(evaluate.HOMES) == sorted(evaluate.__all__)
    assert all(getattr(evaluate, name).__name__ == name for name in evaluate.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = evaluate.nothing


def test_cost_length() -> None:
    assert [EvaluationConfig().seq_for(n) for n in (64, 512)] == [64, 128]
    assert EvaluationConfig(latency_seq=300).seq_for(64) == 300


def test_an_empty_table_is_refused() -> None:
    empty = pa.table({"example_id": [], "nll": [], "tokens": []})
    with pytest.raises(UserError, match="no examples"):
        compute_metrics(["perplexity"], "causal-lm", empty)
