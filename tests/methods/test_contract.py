"""Every method x every fitting family: it learns, moves only what should move, and leaves a stock student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import tiny_model
from toy import ToyCollator, toy_dataset
from transformers import PreTrainedModel

import layerdistill as ld
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.methods.table import METHODS

ENCODERS = ("bert", "roberta", "deberta-v2", "modernbert")
DECODERS = ("gpt2", "opt", "gpt-neox", "llama", "qwen3", "phi")
STEPS = 30

PAIRS = [(method, family) for method in METHODS for family in (*ENCODERS, *DECODERS)]


def task_and_class(family: str) -> tuple[str, str, type]:
    if family in DECODERS:
        return "causal-lm", "causal-lm", transformers.AutoModelForCausalLM
    return "sequence-classification", "sequence-classification", transformers.AutoModelForSequenceClassification


@pytest.mark.parametrize(("method", "family"), PAIRS, ids=[f"{method}-{family}" for method, family in PAIRS])
def test_contract(method: str, family: str, tmp_path: Path) -> None:
    task, head, auto_class = task_and_class(family)
    teacher = tiny_model(family, head, num_layers=4, hidden_size=32, num_heads=4, seed=1)
    student = ld.make_student(teacher, num_blocks=2, hidden_size=16, init="truncate")
    stock_keys = set(type(student)(student.config).state_dict())
    before = fingerprint_model(teacher)
    start = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    rows = toy_dataset(task, size=48, seed=3)
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=16, learning_rate=5e-3, use_cpu=True,
        save_strategy="no", logging_steps=10, disable_tqdm=True, lr_scheduler_type="constant", seed=11,
    )  # fmt: skip
    trainer = ld.LayerDistillationTrainer(
        student, teacher if method != "none" else None, method, args, rows, data_collator=ToyCollator(task)
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0], f"thirty steps lower the objective: {losses}"
    assert fingerprint_model(teacher) == before, "the teacher keeps its weights"
    moved = [name for name, parameter in student.named_parameters() if not torch.equal(parameter, start[name])]
    assert len(moved) >= 0.9 * len(start), "the student learns in (nearly) all its tensors"
    assert set(student.state_dict()) == stock_keys
    reopens(student, tmp_path / "student", auto_class, rows, task, trainer)


def reopens(student: PreTrainedModel, folder: Path, auto_class: type, rows: object, task: str, trainer: object) -> None:
    """The saved student opens with plain transformers, without foreign keys, and gives the same logits."""
    trainer.save_model(str(folder))
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}, "no pickle"
    again, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = ToyCollator(task)(list(rows)[:4])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    student.eval()
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, student(**inputs).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
@pytest.mark.parametrize("task", ["regression", "multi-label-classification"])
def test_every_task(method: str, task: str, tmp_path: Path) -> None:
    problem = {"regression": "regression", "multi-label-classification": "multi_label_classification"}[task]
    labels = 1 if task == "regression" else 3
    models = [
        tiny_model(
            "bert", "sequence-classification", num_layers=layers, num_labels=labels, problem_type=problem, seed=layers
        )
        for layers in (2, 4)
    ]
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=16, learning_rate=2e-3, use_cpu=True,
        save_strategy="no", logging_steps=10, disable_tqdm=True, lr_scheduler_type="constant", seed=11,
    )  # fmt: skip
    trainer = ld.LayerDistillationTrainer(
        *models, method, args, toy_dataset(task, size=48), data_collator=ToyCollator(task)
    )
    assert trainer.task == task
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert "distill/logits" in trainer.state.log_history[0]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(method: str, tmp_path: Path) -> None:
    teacher = tiny_model("bert", "sequence-classification", num_layers=3, seed=1)
    student = ld.make_student(teacher)
    weights = {"task": 0.0} if method == "kd" else {"task": 0.0, "logits": 1.0, "hidden": 1.0}
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path), max_steps=1, optim="sgd", learning_rate=1.0, use_cpu=True, save_strategy="no",
        logging_steps=1, disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = ld.LayerDistillationTrainer(
        student, teacher, method, args, toy_dataset("sequence-classification", size=8),
        method_options={"weights": weights}, data_collator=ToyCollator("sequence-classification"),
    )  # fmt: skip
    student.config.hidden_dropout_prob = 0.0
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.0, abs=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter, dict(teacher.named_parameters())[name], atol=2e-5, rtol=0, msg=name)
