"""`torch_compile`: blocks are compiled, hooks and losses see what they see without it, and nothing stays behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_recipe import method_recipe
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch._dynamo.utils import counters
from toy import ToyCollator, toy_dataset

import layerdistill as ld
from layerdistill.api import make_pair
from layerdistill.core.errors import UserError
from layerdistill.core.types import Needs, Tap
from layerdistill.methods.table import METHODS
from layerdistill.models import find_stacks
from layerdistill.models.adapters import empty_adapters
from layerdistill.runner import run
from layerdistill.signals import LiveTeacher
from layerdistill.train.compiled_blocks import compiled_blocks
from layerdistill.train.trainer import StageTrainer


def trained(folder: Path, task: str, method: str, **training: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A student after three steps on batches of several lengths, and its weights."""
    family = "gpt2" if task == "causal-lm" else "bert"
    student, teacher = (tiny_model(family, task, num_layers=blocks, hidden_size=16, seed=blocks) for blocks in (2, 4))
    args = ld.LayerDistillationConfig(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2, save_strategy="no",
        use_cpu=True, disable_tqdm=True, **training,
    )  # fmt: skip
    trainer = ld.LayerDistillationTrainer(
        student, teacher, method, args, toy_dataset(task, size=16), data_collator=ToyCollator(task)
    )
    trainer.train()
    return student, {name: tensor.clone() for name, tensor in student.state_dict().items()}


@pytest.mark.parametrize(("task", "method"), [("sequence-classification", "cka"), ("causal-lm", "ild")])
def test_compiled_blocks_train_the_same_student(task: str, method: str, tmp_path: Path) -> None:
    _, plain = trained(tmp_path / "plain", task, method)
    torch.compiler.reset()
    counters.clear()
    # The backend that runs the traced operations as they are: no compiler is needed, and not a bit changes.
    student, compiled = trained(tmp_path / "compiled", task, method, torch_compile_backend="eager")
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"], "a block is one graph"
    assert compiled.keys() == plain.keys()
    assert all(torch.equal(compiled[name], plain[name]) for name in plain)
    assert all("forward" not in vars(block) for stack in find_stacks(student).values() for block in stack.blocks)


def test_what_is_compiled_goes_back_once_so_that_no_gradients_of_single_terms_are_logged(tmp_path: Path) -> None:
    logged = []
    for name, training in (("plain", {}), ("compiled", {"torch_compile_backend": "aot_eager"})):
        torch.compiler.reset()
        recipe = method_recipe(tmp_path, "cka", output=str(tmp_path / name))
        recipe["training"] |= {**training, "logging_steps": 1, "max_steps": 2}
        run(recipe, console=Console(quiet=True))
        logged.append(list(map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())))
    plain, compiled = logged
    assert [line["loss"] for line in plain[:2]] == pytest.approx([line["loss"] for line in compiled[:2]], rel=1e-5)
    assert any("grad_norm/" in key for line in plain for key in line)
    assert not any("grad_norm/" in key for line in compiled for key in line)


@pytest.mark.parametrize("method", ["ted", "layer_prune"])
def test_methods_of_several_stages_train_the_same_student(method: str, tmp_path: Path) -> None:
    students = []
    for name, training in (("plain", {}), ("compiled", {"torch_compile_backend": "eager"})):
        torch.compiler.reset()
        counters.clear()
        recipe = method_recipe(tmp_path, method, output=str(tmp_path / name))
        recipe["training"] |= training
        students.append(load_file(run(recipe, console=Console(quiet=True)).student / "model.safetensors"))
        assert bool(counters["stats"]["unique_graphs"]) == bool(training)
    plain, compiled = students
    assert compiled.keys() == plain.keys()
    assert all(torch.equal(compiled[name], plain[name]) for name in plain)


def test_what_is_read_inside_blocks_in_a_later_epoch_is_refused_too(tmp_path: Path) -> None:
    student, teacher = (tiny_model("bert", "sequence-classification", num_layers=blocks) for blocks in (2, 4))
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=3, use_cpu=True, disable_tqdm=True,
        torch_compile_backend="eager",
    )  # fmt: skip
    late = {"rank": 2, "teacher_adapters": "svd", "curriculum": {"start": 2}}
    adapters = {
        path: torch.randn(shape.shape, generator=torch.Generator().manual_seed(1))
        for path, shape in empty_adapters(teacher, 2).items()
    }
    pair = replace(make_pair(teacher, student, seed=3), teacher_adapters=adapters)
    context = type("Context", (), {"epochs": 3})()
    stage = next(METHODS["lora_ild"].stages(pair, METHODS["lora_ild"].Config(name="lora_ild", **late), context))
    data = toy_dataset("sequence-classification", size=16)
    trainer = StageTrainer(
        stage, pair.task, args, data, LiveTeacher(teacher), data_collator=ToyCollator("sequence-classification")
    )
    with pytest.raises(UserError, match="reads the inputs or outputs of modules inside the student's blocks"):
        trainer.train()


def test_a_method_that_reads_inside_blocks_is_refused(tmp_path: Path) -> None:
    student = tiny_model("bert", "sequence-classification")
    args = ld.LayerDistillationConfig(output_dir=str(tmp_path), use_cpu=True, torch_compile_backend="eager")
    needs = Needs(student_taps=frozenset({Tap("bert.encoder.layer.0.attention.self.query", "input")}))
    with (
        pytest.raises(UserError, match="reads the inputs or outputs of modules inside the student's blocks"),
        compiled_blocks(student, args, needs),
    ):
        pytest.fail("nothing is to be trained")
