"""Every method x every fitting family: it learns, spares its teacher, gives a student that opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from method_cases import OPTIONS, PAIRS, auto_class, distilled, task_of
from safetensors.torch import load_file
from tiny_models import tiny_model
from toy import ToyCollator, toy_dataset
from transformers import PreTrainedModel

import layerdistill as ld
from layerdistill.methods.table import METHODS

STEPS = 30
ONE_STAGE = [name for name in METHODS if METHODS[name].one_stage]


@pytest.mark.parametrize(("method", "family"), PAIRS, ids=[f"{method}-{family}" for method, family in PAIRS])
def test_contract(method: str, family: str, tmp_path: Path) -> None:
    teacher, student = distilled(method, family, tmp_path / "run", STEPS, save_steps=20)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    for stage in stages:
        losses = [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]
        assert min(losses[-2:]) < losses[0] or len(losses) == 1, f"training lowers the objective of {stage}: {losses}"
    reopens(student, tmp_path / "student", family)
    if METHODS[method].grows_student:
        size = sum(parameter.numel() for parameter in student.parameters())
        assert size < sum(parameter.numel() for parameter in teacher.parameters())


def reopens(student: PreTrainedModel, folder: Path, family: str) -> None:
    """The saved student opens, with plain transformers if its blocks are stock, and gives the same logits."""
    student.save_pretrained(folder)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".py"}, "no pickle"
    own_code = (folder / "modeling_layerdistill.py").exists()
    again, info = auto_class(family).from_pretrained(folder, output_loading_info=True, trust_remote_code=own_code)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    foreign = [
        key for key in load_file(folder / "model.safetensors") if "lora" in key or "filter" in key or "proj_" in key
    ]
    assert not foreign
    task = task_of(family)
    batch = ToyCollator(task)(list(toy_dataset(task, size=4)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    student.eval()
    with torch.no_grad():
        expected = student(**inputs).logits
        torch.testing.assert_close(again.eval()(**inputs).logits, expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ld.load_student(folder)(**inputs).logits, expected, atol=1e-6, rtol=1e-5)
    ld.save_student(student, folder.with_name("saved"))
    assert {path.name for path in folder.iterdir()} == {path.name for path in folder.with_name("saved").iterdir()}


@pytest.mark.parametrize("method", ONE_STAGE)
def test_what_should_move_moves(method: str, tmp_path: Path) -> None:
    teacher = tiny_model("bert", "sequence-classification", num_layers=4, hidden_size=32, num_heads=4, seed=1)
    student = ld.make_student(teacher, num_blocks=2, hidden_size=16, init="truncate")
    start = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=16, learning_rate=5e-3, use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    task = "sequence-classification"
    ld.LayerDistillationTrainer(
        student, teacher if method != "none" else None, method, args, toy_dataset(task), data_collator=ToyCollator(task)
    ).train()
    moved = [name for name, parameter in student.named_parameters() if not torch.equal(parameter, start[name])]
    assert len(moved) >= 0.9 * len(start), "the student learns in (nearly) all its tensors"


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].one_stage])
def test_a_trainer_refuses_what_is_more_than_one_stage(method: str, tmp_path: Path) -> None:
    teacher = tiny_model("bert", "sequence-classification", num_layers=4, seed=1)
    args = ld.LayerDistillationConfig(output_dir=str(tmp_path), use_cpu=True)
    given = {"method_options": OPTIONS.get(method, {}), "data_collator": ToyCollator("sequence-classification")}
    with pytest.raises(ld.UserError, match="distill"):
        ld.LayerDistillationTrainer(
            ld.make_student(teacher, num_blocks=2),
            teacher,
            method,
            args,
            toy_dataset("sequence-classification"),
            **given,
        )


@pytest.mark.parametrize("method", [name for name in ONE_STAGE if name != "none"])
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


@pytest.mark.parametrize("method", [name for name in ONE_STAGE if name not in ("none", "rail_kd")])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(method: str, tmp_path: Path) -> None:
    """Of rail_kd this is not true: the maps of the two sides are drawn independently of one another."""
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
