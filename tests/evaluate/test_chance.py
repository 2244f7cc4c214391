"""The best constant answer, by trying constants."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from datasets import Dataset

from layerdistill.evaluate import chance_levels
from layerdistill.evaluate.metrics import METRICS


def test_the_majority_class() -> None:
    found = chance_levels(
        ["accuracy", "f1", "matthews"], "sequence-classification", Dataset.from_dict({"labels": [0, 0, 0, 1]})
    )
    assert found == {"accuracy": 0.75, "f1": pytest.approx(2 * 0.25 / 1.25), "matthews": 0.0}


def test_numbers() -> None:
    found = chance_levels(["pearson", "spearman", "mse"], "regression", Dataset.from_dict({"labels": [0.0, 1.0, 5.0]}))
    assert found == {"pearson": 0.0, "spearman": 0.0, "mse": pytest.approx((4 + 1 + 9) / 3)}


@pytest.mark.parametrize("shares", [(0.45, 0.35, 0.05, 0.03, 0.02), (0.9, 0.6, 0.5), (0.0, 0.1, 0.0), (0.5, 0.5, 0.5)])
def test_no_constant_set_of_labels_is_better(shares: tuple[float, ...]) -> None:
    generator = np.random.default_rng(4)
    labels = (generator.random((40, len(shares))) < shares).astype(int)
    labels[0, 0] = 1
    names = ["accuracy", "f1", "macro_f1"]
    found = chance_levels(names, "multi-label-classification", Dataset.from_dict({"labels": labels.tolist()}))
    every = [np.tile(answer, (len(labels), 1)) for answer in itertools.product((0, 1), repeat=len(shares))]
    for name in names:
        assert found[name] == pytest.approx(max(METRICS[name](answer, labels) for answer in every)), name


def test_tokens_by_their_frequency_without_the_first_and_the_ignored() -> None:
    rows = Dataset.from_dict({"input_ids": [[9, 1, 1, 2], [9, 1, 3, 3]], "labels": [[9, 1, 1, 2], [9, -100, 1, 4]]})
    shares = [3 / 5, 1 / 5, 1 / 5]
    entropy = -sum(share * math.log(share) for share in shares)
    assert chance_levels(["perplexity"], "causal-lm", rows) == {"perplexity": pytest.approx(math.exp(entropy))}
