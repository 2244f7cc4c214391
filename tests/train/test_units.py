"""Counts of examples, tokens and labels over micro-batches."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from layerdistill.signals.source import batch_masks
from layerdistill.train.units import UNITS, count_of, sum_units


def test_counts_add_up_over_micro_batches() -> None:
    labels = torch.tensor([[5, 6, -100, -100], [7, 8, 9, -100]])
    first = {
        "input_ids": torch.ones(2, 4),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]),
        "labels": labels,
    }
    second = {"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 2), "labels": torch.tensor([[3, 4]])}
    counts = sum_units([first, second], "causal-lm")
    found = {unit: count_of(counts, unit).item() for unit in UNITS}
    # The first label of a row is predicted by nothing, so rows of 2, 3 and 2 labels have 1, 2 and 1 predicted ones.
    assert found == {"example": 3, "token": 7, "decoder_token": 7, "label": 4, "batch": 2}


def test_classification_counts_examples_as_labels() -> None:
    batch = {"input_ids": torch.ones(3, 5), "labels": torch.tensor([0, 1, 2])}
    counts = sum_units([batch], "sequence-classification")
    assert count_of(counts, "label") == 3
    assert count_of(counts, "token") == 15, "without a mask every position is real"


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("sequence-classification", torch.tensor([0, 2])),
        ("regression", torch.tensor([0.5, 1.5])),
        ("multi-label-classification", torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])),
        ("multi-label-classification", torch.tensor([[0, 1, 1], [1, 0, 0]])),
    ],
)
def test_the_decoder_of_a_classifier_reads_what_its_encoder_reads(task: str, labels: torch.Tensor) -> None:
    model = tiny_model("bart", "sequence-classification")
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    batch = {"input_ids": torch.full((2, 5), 2), "attention_mask": mask, "labels": labels}
    counts = sum_units([batch], task)
    assert count_of(counts, "decoder_token") == batch_masks(model, batch)["decoder"].sum() == 6


def test_a_step_without_labels_divides_by_one() -> None:
    batch = {"input_ids": torch.ones(1, 3), "labels": torch.full((1, 3), -100)}
    assert count_of(sum_units([batch], "causal-lm"), "label") == 1
