"""The trainer: exact under accumulation, padding and processes; the teacher stays as it is; Trainer's own contract."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from toy import ToyCollator, toy_dataset
from toy_recipe import toy_tokenizer

import layerdistill as ld
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.data import Collator

EXACT = [
    ("kd", {}),
    ("ild", {}),
    ("ild", {"distance": "cosine"}),
]


def one_step(
    folder: Path,
    method: str,
    options: dict,
    batch: int,
    accumulation: int,
    to: int | None = None,
    task: str = "sequence-classification",
) -> dict[str, torch.Tensor]:
    """The student's change in one plain gradient step over eight examples."""
    head = "causal-lm" if task == "causal-lm" else "sequence-classification"
    family = "gpt2" if task == "causal-lm" else "bert"
    student = tiny_model(family, head, num_layers=2, hidden_size=16, num_heads=2, seed=1)
    teacher = tiny_model(family, head, num_layers=4, hidden_size=32, num_heads=4, seed=2)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    args = ld.LayerDistillationConfig(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0,
        save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = ld.LayerDistillationTrainer(
        student,
        teacher,
        method,
        args,
        toy_dataset(task, size=8),
        method_options=options,
        data_collator=ToyCollator(task, to),
    )
    trainer.train()
    return {name: tensor - before[name] for name, tensor in student.state_dict().items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float = 2e-6) -> None:
    assert ours.keys() == theirs.keys()
    moved = max(tensor.abs().max().item() for tensor in ours.values())
    assert moved > 1e-3, "the step must have moved something, or equality means nothing"
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("method", "options"), EXACT)
@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_accumulation_gives_the_same_gradient(tmp_path: Path, method: str, options: dict, task: str) -> None:
    whole = one_step(tmp_path / "1", method, options, 8, 1, task=task)
    for batch, accumulation in [(2, 4), (1, 8)]:
        assert_same(whole, one_step(tmp_path / str(accumulation), method, options, batch, accumulation, task=task))


def test_cka_is_the_exception_under_accumulation(tmp_path: Path) -> None:
    whole = one_step(tmp_path / "1", "cka", {}, 8, 1)
    pieces = one_step(tmp_path / "4", "cka", {}, 2, 4)
    assert any((whole[name] - pieces[name]).abs().max() > 1e-4 for name in whole)


@pytest.mark.parametrize("method", ["kd", "ild", "cka"])
def test_padding_changes_nothing(tmp_path: Path, method: str) -> None:
    assert_same(
        one_step(tmp_path / "a", method, {}, 8, 1), one_step(tmp_path / "b", method, {}, 8, 1, to=32), atol=1e-5
    )


def test_the_teacher_keeps_its_weights_and_the_student_moves(tmp_path: Path) -> None:
    student = tiny_model("bert", "sequence-classification", num_layers=2, seed=1)
    teacher = tiny_model("bert", "sequence-classification", num_layers=4, seed=2)
    before, start = fingerprint_model(teacher), fingerprint_model(student)
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path), max_steps=3, save_strategy="no", use_cpu=True, logging_steps=1, disable_tqdm=True
    )
    trainer = ld.LayerDistillationTrainer(
        student,
        teacher,
        "ild",
        args,
        toy_dataset("sequence-classification"),
        data_collator=ToyCollator("sequence-classification"),
    )
    trainer.train()
    assert fingerprint_model(teacher) == before
    assert fingerprint_model(student) != start
    assert not teacher.training
    names = {name for line in trainer.state.log_history for name in line}
    assert {"distill/task", "distill/logits", "distill/hidden/1-2", "distill/hidden/2-4", "grad_norm/hidden"} <= names


def test_logged_means_are_those_of_the_terms(tmp_path: Path) -> None:
    student = tiny_model("bert", "sequence-classification", num_layers=2, seed=1)
    rows = toy_dataset("sequence-classification", size=8)
    batch = ToyCollator("sequence-classification")(list(rows))
    with torch.no_grad():
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    by_hand = -sum(
        (logit[label] - math.log(sum(math.exp(value) for value in logit.tolist()))).item()
        for logit, label in zip(logits, batch["labels"], strict=True)
    ) / len(logits)
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path), max_steps=1, logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    trainer = ld.LayerDistillationTrainer(
        student, None, "none", args, rows, data_collator=ToyCollator("sequence-classification")
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["distill/task"] == pytest.approx(by_hand, rel=1e-5)
    assert logged["loss"] == pytest.approx(by_hand, rel=1e-3), "the Trainer rounds its loss"


def test_a_broken_term_stops_the_run_and_is_named(tmp_path: Path) -> None:
    student = tiny_model("bert", "sequence-classification", num_layers=2, seed=1)
    teacher = tiny_model("bert", "sequence-classification", num_layers=4, seed=2)
    with torch.no_grad():
        teacher.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, disable_tqdm=True, save_steps=1
    )
    trainer = ld.LayerDistillationTrainer(
        student,
        teacher,
        "ild",
        args,
        toy_dataset("sequence-classification"),
        data_collator=ToyCollator("sequence-classification"),
    )
    with pytest.raises(ld.UserError, match=r"distill/hidden/1-2 = nan"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*")), "no checkpoint is made of a broken state"


def test_gradient_checkpointing_gives_the_same_step(tmp_path: Path) -> None:
    steps = []
    for checkpointing in (False, True):
        student = tiny_model("bert", "sequence-classification", num_layers=2, seed=1)
        teacher = tiny_model("bert", "sequence-classification", num_layers=4, seed=2)
        args = ld.LayerDistillationConfig(
            output_dir=str(tmp_path), max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
            max_grad_norm=0.0, save_strategy="no", use_cpu=True, disable_tqdm=True,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        ld.LayerDistillationTrainer(
            student, teacher, "cka", args, toy_dataset("sequence-classification", size=8),
            data_collator=ToyCollator("sequence-classification"),
        ).train()  # fmt: skip
        steps.append(student.state_dict())
    for name, tensor in steps[0].items():
        torch.testing.assert_close(tensor, steps[1][name], atol=1e-6, rtol=1e-5)


def test_evaluation_inside_training_reports_the_task_loss(tmp_path: Path) -> None:
    student = tiny_model("bert", "sequence-classification", num_layers=2, seed=1)
    teacher = tiny_model("bert", "sequence-classification", num_layers=4, seed=2)
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, use_cpu=True, disable_tqdm=True
    )
    trainer = ld.LayerDistillationTrainer(
        student, teacher, "kd", args, toy_dataset("sequence-classification"),
        eval_dataset=toy_dataset("sequence-classification", seed=9),
        data_collator=ToyCollator("sequence-classification"),
        compute_metrics=lambda given: {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())},
    )  # fmt: skip
    trainer.train()
    evaluated = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert len(evaluated) == 2
    assert 0 <= evaluated[-1]["eval_accuracy"] <= 1


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_every_token_weighs_the_same_in_the_loss_of_an_evaluation(batch_size: int, tmp_path: Path) -> None:
    rows = [{"input_ids": [5 + n % 3] * n, "attention_mask": [1] * n, "labels": [5 + n % 3] * n} for n in range(2, 11)]
    model = tiny_model("gpt2", "causal-lm", num_layers=2, seed=1)
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path), per_device_eval_batch_size=batch_size, use_cpu=True, disable_tqdm=True
    )
    found = ld.LayerDistillationTrainer(
        model, None, "none", args, rows, eval_dataset=rows, data_collator=Collator(toy_tokenizer(), "causal-lm")
    ).evaluate()["eval_loss"]
    total = count = 0.0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        chosen = logits[:-1].log_softmax(-1).gather(1, torch.tensor(row["labels"][1:])[:, None])
        total, count = total - chosen.sum().item(), count + len(chosen)
    assert found == pytest.approx(total / count, rel=1e-6)


DISTRIBUTED = """
import json
import sys
from pathlib import Path
from safetensors.torch import save_file
from tiny_models import tiny_model
from toy import ToyCollator, toy_dataset
import layerdistill as ld

task = "sequence-classification"
for method in sys.argv[3:]:
    folder = Path(sys.argv[1]) / method
    student = tiny_model("bert", task, num_layers=2, hidden_size=16, num_heads=2, seed=1)
    teacher = tiny_model("bert", task, num_layers=4, hidden_size=32, num_heads=4, seed=2)
    args = ld.LayerDistillationConfig(
        output_dir=str(folder), per_device_train_batch_size=int(sys.argv[2]), max_steps=2, optim="sgd",
        learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", use_cpu=True,
        logging_steps=1, disable_tqdm=True)
    trainer = ld.LayerDistillationTrainer(
        student, teacher, method, args, toy_dataset(task, size=16), data_collator=ToyCollator(task))
    trainer.train()
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(student.state_dict(), folder / "student.safetensors")
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history[:2]))
"""
SHARED = ("kd", "ild", "cka")


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `1` and `2`: the methods in one process with 8 examples a step, and in two with 4 each."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "train.py"
    script.write_text(DISTRIBUTED)
    for processes, batch in [(1, 8), (2, 4)]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [*launch, str(script), str(folder / str(processes)), str(batch), *SHARED],
            capture_output=True, text=True, check=False, timeout=240,
            env=with_tests_on_path(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("method", SHARED)
def test_two_processes_equal_one(shared_runs: Path, method: str) -> None:
    results = []
    for processes in ("1", "2"):
        folder = shared_runs / processes / method
        results.append((load_file(folder / "student.safetensors"), json.loads((folder / "log.json").read_text())))
    (one, one_log), (two, two_log) = results
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, two[name], atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    for first, second in zip(one_log, two_log, strict=True):
        terms = [name for name in first if name.startswith("distill/")]
        assert terms
        for name in terms:
            assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-6), name


def with_tests_on_path() -> dict[str, str]:
    """The environment with this test folder importable and one thread per process."""
    return {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def test_mixed_precision_stays_near_float32_and_keeps_float32_weights(tmp_path: Path) -> None:
    found = []
    for bf16 in (False, True):
        student = tiny_model("bert", "sequence-classification", num_layers=2, seed=1)
        teacher = tiny_model("bert", "sequence-classification", num_layers=4, seed=2)
        args = ld.LayerDistillationConfig(
            output_dir=str(tmp_path), max_steps=3, logging_steps=1, save_strategy="no", use_cpu=True, bf16=bf16,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = ld.LayerDistillationTrainer(
            student, teacher, "cka", args, toy_dataset("sequence-classification"),
            data_collator=ToyCollator("sequence-classification"),
        )  # fmt: skip
        trainer.train()
        assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
        found.append([line for line in trainer.state.log_history if "loss" in line])
    for exact, rounded in zip(*found, strict=True):
        assert exact["distill/task"] != rounded["distill/task"], "autocast must really have been on"
        for name in (name for name in exact if name.startswith("distill/")):
            assert rounded[name] == pytest.approx(exact[name], rel=0.05, abs=0.02), name
