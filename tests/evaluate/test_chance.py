"""The best constant answer, by trying constants."""

from __future__ import annotations

import math

import pytest
from datasets import Dataset

from layerdistill.evaluate import chance_levels


def test_the_majority_class() -> None:
    found = chance_levels(
        ["accuracy", "f1", "matthews"], "sequence-classification", Dataset.from_dict({"labels": [0, 0, 0, 1]})
    )
    assert found == {"accuracy": 0.75, "f1": pytest.approx(2 * 0.25 / 1.25), "matthews": 0.0}


def test_numbers() -> None:
    found = chance_levels(["pearson", "spearman", "mse"], "regression", Dataset.from_dict({"labels": [0.0, 1.0, 5.0]}))
    assert found == {"pearson": 0.0, "spearman": 0.0, "mse": pytest.approx((4 + 1 + 9) / 3)}


def test_each_label_by_itself() -> None:
    rows = Dataset.from_dict({"labels": [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]})
    assert chance_levels(["accuracy"], "multi-label-classification", rows) == {"accuracy": 0.75}


def test_tokens_by_their_frequency_without_the_first_and_the_ignored() -> None:
    rows = Dataset.from_dict({"input_ids": [[9, 1, 1, 2], [9, 1, 3, 3]], "labels": [[9, 1, 1, 2], [9, -100, 1, 4]]})
    shares = [3 / 5, 1 / 5, 1 / 5]
    entropy = -sum(share * math.log(share) for share in shares)
    assert chance_levels(["perplexity"], "causal-lm", rows) == {"perplexity": pytest.approx(math.exp(entropy))}
