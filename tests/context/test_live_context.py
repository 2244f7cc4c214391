"""What a method may ask of a run: decisions that last, calibration rows, scores, and the training data in its order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model
from toy import ToyCollator, toy_dataset
from transformers import PreTrainedModel, TrainingArguments

from layerdistill.context import LiveContext
from layerdistill.core.errors import UserError
from layerdistill.data import CALIBRATION, CalibrationConfig, set_aside
from layerdistill.train.stage import StageInput

TASK = "sequence-classification"


def context_for(
    folder: Path,
    metrics: tuple[str, ...] = ("accuracy",),
    training: Any = None,
    task: str = TASK,
    splits: tuple[str, ...] = ("train", "validation", CALIBRATION),
    console: Console | None = None,
) -> LiveContext:
    """A context of a run with 30 training rows, 10 of them set aside, and 12 to validate on."""
    datasets = set_aside({"train": toy_dataset(task, 30, seed=1)}, CalibrationConfig(examples=10), seed=5)
    datasets["validation"] = toy_dataset(task, 12, seed=2)
    given = StageInput(
        task,
        {name: rows for name, rows in datasets.items() if name in splits},
        ToyCollator(task),
        None,
        {"per_device_train_batch_size": 8} if training is None else training,
        5,
        folder,
        console or Console(quiet=True),
    )
    return LiveContext(given, metrics, batch_size=4)


def never() -> Any:
    raise AssertionError("chosen a second time")


def test_a_decision_is_made_once_and_read_back_by_the_next_process(tmp_path: Path) -> None:
    first = context_for(tmp_path)
    assert first.decide("order", lambda: [3, 1]) == [3, 1]
    assert first.decide("round-1", lambda: {"removed": [2], "score": 0.1 + 0.2}) == {"removed": [2], "score": 0.1 + 0.2}
    again = context_for(tmp_path)
    assert again.decide("order", never) == [3, 1]
    assert again.decide("round-1", never) == {"removed": [2], "score": 0.1 + 0.2}, "to the last bit"
    assert list(json.loads((tmp_path / "decisions.json").read_text())) == ["order", "round-1"]
    assert again.decide("nothing", lambda: None) is None
    assert again.decide("nothing", never) is None, "to have chosen nothing is a choice"


def test_a_choice_that_dies_leaves_the_earlier_ones(tmp_path: Path) -> None:
    context = context_for(tmp_path)
    context.decide("order", lambda: [3, 1])
    with pytest.raises(AssertionError):
        context.decide("round-1", never)
    assert json.loads((tmp_path / "decisions.json").read_text()) == {"order": [3, 1]}
    assert [path.name for path in tmp_path.iterdir()] == ["decisions.json"]


def test_a_decision_within_a_decision_is_kept_too(tmp_path: Path) -> None:
    context = context_for(tmp_path)
    assert context.decide("outer", lambda: [context.decide("inner", lambda: 1)]) == [1]
    assert set(json.loads((tmp_path / "decisions.json").read_text())) == {"inner", "outer"}


def ids_of(batches: Any) -> list[list[int]]:
    return [
        [int(token) for token, real in zip(row, mask, strict=True) if real]
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_calibration_rows_and_training_rows_come_in_batches_in_their_order(tmp_path: Path) -> None:
    context = context_for(tmp_path)
    batches = context.calibration()
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
    assert ids_of(batches) == [list(ids) for ids in context.given.datasets[CALIBRATION]["input_ids"]]
    training = list(context.training_batches())
    assert [len(batch["input_ids"]) for batch in training] == [8, 8, 4], "as large as those of training"
    assert ids_of(training) == [list(ids) for ids in context.given.datasets["train"]["input_ids"]]
    assert ids_of(context.training_batches()) == ids_of(training), "the same again"


def test_without_calibration_rows_there_is_nothing_to_choose_by(tmp_path: Path) -> None:
    context = context_for(tmp_path, splits=("train", "validation"))
    with pytest.raises(UserError, match=r"No rows were set aside .* `calibration` section"):
        context.calibration()


@torch.no_grad()
def share_right(model: PreTrainedModel, rows: Any) -> float:
    """Accuracy row by row, without batches or padding."""
    model.eval()
    right = [int(model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax()) == row["labels"] for row in rows]
    return sum(right) / len(right)


def test_the_score_is_of_the_calibration_rows_and_the_evaluation_of_the_validation_rows(tmp_path: Path) -> None:
    context = context_for(tmp_path, ("accuracy", "macro_f1"))
    model = next(
        made
        for seed in range(20)
        if share_right(made := tiny_model("bert", TASK, seed=seed), context.given.datasets[CALIBRATION])
        != share_right(made, context.given.datasets["validation"])
    )
    assert context.score(model) == pytest.approx(share_right(model, context.given.datasets[CALIBRATION]))
    found = context.evaluate(model)
    assert set(found) == {"accuracy", "macro_f1"}
    assert found["accuracy"] == pytest.approx(share_right(model, context.given.datasets["validation"]))
    assert context_for(tmp_path, splits=("train", CALIBRATION)).evaluate(model) == {}


def test_of_perplexity_less_is_more(tmp_path: Path) -> None:
    context = context_for(tmp_path, ("perplexity",), task="causal-lm")
    model = tiny_model("gpt2", "causal-lm")
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    with torch.no_grad():
        for row in context.given.datasets[CALIBRATION]:
            ids = torch.tensor(row["input_ids"])
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
            total -= logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum()
            count += len(ids) - 1
    assert context.score(model) == pytest.approx(-float((total / count).exp()), rel=1e-5)


def test_a_score_that_is_undefined_is_refused(tmp_path: Path) -> None:
    context = context_for(tmp_path, ("pearson",), task="regression")
    model = tiny_model("bert", TASK, num_labels=1, problem_type="regression")
    with torch.no_grad():
        model.classifier.weight.zero_()
    with pytest.raises(UserError, match=r"pearson is undefined on the calibration rows.*method\.calibration\.examples"):
        context.score(model)


@pytest.mark.parametrize(
    ("training", "epochs"),
    [
        ({}, 3),  # transformers' default
        ({"num_train_epochs": 2.5}, 3),
        ({"max_steps": 6, "per_device_train_batch_size": 8}, 2),  # three batches of 20 rows an epoch
        ({"max_steps": 7, "per_device_train_batch_size": 8}, 3),
        ({"max_steps": 7, "per_device_train_batch_size": 8, "num_train_epochs": 9}, 3),
        ({"max_steps": 7, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 3),
        ({"max_steps": 1, "per_device_train_batch_size": 64}, 1),
    ],
)
def test_epochs_are_counted_as_training_counts_them(tmp_path: Path, training: dict[str, Any], epochs: int) -> None:
    assert context_for(tmp_path, training=training).epochs == epochs
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **training)
    assert context_for(tmp_path, training=arguments).epochs == epochs


def test_sentences_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    context_for(tmp_path, console=Console(width=200)).say("Round 1: [3, 1] [bold]left[/bold]")
    assert capsys.readouterr().out == "Round 1: [3, 1] [bold]left[/bold]\n"
