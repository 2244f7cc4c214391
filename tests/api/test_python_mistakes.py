"""What is often given wrongly in Python is said in a sentence before anything runs, and what was lent is given back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny_models import tiny_model
from toy import toy_dataset
from toy_recipe import toy_tokenizer

import layerdistill as ld
from layerdistill.core.errors import UserError

TASK = "sequence-classification"


def pair() -> dict[str, Any]:
    sizes = ((4, 32), (2, 16))
    teacher, student = (tiny_model("bert", TASK, num_layers=n, hidden_size=wide, num_heads=2) for n, wide in sizes)
    return {"teacher": teacher, "student": student, "train_dataset": toy_dataset(TASK, 16), "method": "kd"}


def distilled(folder: Path, **given: Any) -> ld.DistillResult:
    args = ld.LayerDistillationConfig(
        output_dir=str(folder), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    return ld.distill(**{**pair(), "processing_class": toy_tokenizer(), "args": args, **given})


def beyond(rows: Dataset) -> Dataset:
    return rows.map(lambda row: {"labels": 7})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda given: {"teacher": "bert-base-uncased"}, "The teacher is 'bert-base-uncased': pass a model that is"),
        (lambda given: {"method": given["train_dataset"]}, "method is a Dataset: pass a name"),
        (
            lambda given: {"train_dataset": Dataset.from_list([{"text": "a", "label": 0}])},
            "text, label, but no input_ids",
        ),
        (
            lambda given: {"train_dataset": DatasetDict(train=given["train_dataset"])},
            r"DatasetDict \(train\): pass one",
        ),
        (
            lambda given: {"train_dataset": beyond(given["train_dataset"])},
            "train_dataset has a label 7, but the student",
        ),
        (lambda given: {"eval_dataset": beyond(given["train_dataset"])}, "eval_dataset has a label 7"),
        (
            lambda given: {"train_dataset": given["train_dataset"].remove_columns("labels")},
            "The examples have no labels",
        ),
        (lambda given: {"student": given["student"].requires_grad_(False)}, r"Call student\.requires_grad_\(True\)"),
        (lambda given: {"cache": True}, r"cache is True: pass a layerdistill\.CacheConfig"),
    ],
)
def test_it_is_refused(wrong: Callable[[dict[str, Any]], dict[str, Any]], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        distilled(tmp_path / "out", **wrong(pair()))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mode": "on"}, "CacheConfig.mode is 'on', but must be one of: auto, off, fill, require"),
        ({"dtype": "float8"}, "CacheConfig.dtype is 'float8', but must be one of"),
        ({"gb": 0.0}, "CacheConfig.gb is 0.0"),
        ({"gb": "5"}, "CacheConfig.gb is '5'"),
    ],
)
def test_a_cache_is_described_in_words_that_are_known(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ld.CacheConfig(**wrong)


def test_labels_that_nobody_reads_and_rows_that_are_made_when_read_are_fine(tmp_path: Path) -> None:
    rows = toy_dataset(TASK, 16)
    hidden = rows.map(lambda row: {"labels": -1})
    assert distilled(tmp_path / "hidden", train_dataset=hidden, weights={"task": 0.0, "logits": 1.0})
    some = rows.map(lambda row, number: {"labels": -100 if number % 2 else row["labels"]}, with_indices=True)
    assert distilled(tmp_path / "some", train_dataset=some)
    stored = Dataset.from_dict({"number": list(range(16))})
    made = stored.with_transform(lambda batch: rows[batch["number"]])
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path / "made"), max_steps=1, use_cpu=True, report_to="none", remove_unused_columns=False
    )
    given = pair()
    models = given["student"], given["teacher"]
    ld.LayerDistillationTrainer(*models, "kd", args, made, processing_class=toy_tokenizer()).train()


def test_models_in_each_others_place_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = pair()
    twin = tiny_model("bert", TASK, num_layers=4, hidden_size=34, num_heads=2)
    with caplog.at_level(logging.WARNING):
        distilled(tmp_path / "right", method="kd")
        distilled(tmp_path / "like", student=twin)
        assert "each other's place" not in caplog.text
        distilled(tmp_path / "swapped", teacher=given["student"], student=given["teacher"])
    assert "are they in each other's place?" in caplog.text


def test_the_teacher_can_be_trained_afterwards(tmp_path: Path) -> None:
    teacher = pair()["teacher"]
    teacher.bert.embeddings.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in teacher.named_parameters()}
    distilled(tmp_path, teacher=teacher)
    assert {name: parameter.requires_grad for name, parameter in teacher.named_parameters()} == before
    assert any(before.values())
    assert not all(before.values())
    teacher(torch.tensor([[1, 2]]), labels=torch.tensor([0])).loss.backward()


def test_a_student_is_not_saved_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file, so no model can be saved there"):
        ld.save_student(pair()["student"], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
