"""A batch is padded as asked, and nothing but padding is masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from data_samples import bert_tokenizer, byte_tokenizer

from layerdistill.core.errors import UserError
from layerdistill.data.collate import Collator

EXAMPLES = [
    {"input_ids": [2, 7, 3], "attention_mask": [1, 1, 1], "token_type_ids": [0, 0, 1], "labels": 1, "example_id": 4},
    {"input_ids": [2, 7, 8, 9, 3], "attention_mask": [1] * 5, "token_type_ids": [0] * 5, "labels": 0, "example_id": 9},
]


def test_padding_is_on_the_right_and_masked() -> None:
    tokenizer = bert_tokenizer()
    tokenizer.padding_side = "left"
    batch = Collator(tokenizer, "sequence-classification")(EXAMPLES)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["input_ids"].tolist() == [[2, 7, 3, 0, 0], [2, 7, 8, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 0, 0], [0] * 5]
    assert batch["labels"].tolist() == [1, 0]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 5),
        ({"pad_to_multiple_of": 8}, 8),
        ({"pad_to_multiple_of": 4, "max_length": 16}, 8),
        ({"pad_to_multiple_of": 8, "max_length": 6}, 6),
        ({"pad_to_multiple_of": 8, "max_length": 4}, 5),
        ({"padding": "max_length", "max_length": 11}, 11),
        ({"padding": "max_length", "max_length": 11, "pad_to_multiple_of": 8}, 11),
    ],
)
def test_the_padded_length(options: dict[str, Any], length: int) -> None:
    batch = Collator(bert_tokenizer(), "sequence-classification", **options)(EXAMPLES)
    assert batch["input_ids"].shape == (2, length)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 5]


@pytest.mark.parametrize(
    ("task", "labels", "dtype"),
    [
        ("sequence-classification", [0, 2], torch.long),
        ("multi-label-classification", [[1, 0, 1], [0, 0, 0]], torch.float32),
        ("regression", [2, 3.5], torch.float32),
    ],
)
def test_labels_have_the_type_their_loss_needs(task: str, labels: list[Any], dtype: torch.dtype) -> None:
    for name in ("labels", "label"):
        examples = [{"input_ids": [1, 2], name: label} for label in labels]
        batch = Collator(bert_tokenizer(), task)(examples)
        assert batch["labels"].dtype == dtype
        assert batch["labels"].tolist() == labels
        assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_examples_without_labels_make_a_batch_without_labels() -> None:
    assert "labels" not in Collator(bert_tokenizer(), "regression")([{"input_ids": [1]}, {"input_ids": [1, 2]}])


def test_a_tokenizer_without_a_pad_token_keeps_real_end_tokens() -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    examples = [{"input_ids": [5, end], "labels": [-100, end]}, {"input_ids": [5, 6, end]}]
    batch = Collator(tokenizer, "causal-lm", pad_to_multiple_of=4)(examples)
    assert batch["input_ids"].tolist() == [[5, end, end, end], [5, 6, end, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, end, -100, -100], [5, 6, end, -100]]


def test_a_wrong_collator_is_refused() -> None:
    with pytest.raises(UserError, match="needs max_length"):
        Collator(bert_tokenizer(), "regression", padding="max_length")
    with pytest.raises(UserError, match="Supported"):
        Collator(bert_tokenizer(), "classification")
