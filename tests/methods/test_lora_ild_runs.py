"""LoRAILD: whole runs, from recipes and from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_cases import RANK, first_stage, hidden_term
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn
from toy import ToyCollator, toy_dataset
from toy_recipe import toy_recipe, toy_tokenizer

import layerdistill as ld
from layerdistill import finetune
from layerdistill.api import make_pair
from layerdistill.core.errors import UserError
from layerdistill.core.seeds import seeded
from layerdistill.core.types import Progress
from layerdistill.models.adapters import adapted_layers, merge_adapters
from layerdistill.models.projections import projection_paths
from layerdistill.prepare import prepare
from layerdistill.recipe import load_recipe
from layerdistill.runner import run
from layerdistill.signals import LiveTeacher, student_signal
from layerdistill.train.trainer import StageTrainer

QUIET = Console(quiet=True)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERDISTILL_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "teachers"


def lora_recipe(folder: Path, output: str = "run", method: str = "lora_ild", **options: Any) -> dict[str, Any]:
    recipe = toy_recipe(folder, output=str(folder / output), evaluation={"cost": False})
    recipe["method"] = {"name": method, **({"rank": RANK} if method == "lora_ild" else {}), **options}
    recipe["teacher"]["finetune"] = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "lora": {"rank": RANK},
    }  # fmt: skip
    recipe["training"] = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_steps": 2, "logging_steps": 1,
    }  # fmt: skip
    return recipe


def kept(home: Path) -> Path:
    (folder,) = (path for path in home.iterdir() if path.is_dir() and path.suffix != ".work")
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def test_a_run_leaves_a_plain_student_and_a_teacher_for_every_method(tmp_path: Path, home: Path) -> None:
    result = run(lora_recipe(tmp_path), console=QUIET)
    folder = kept(home)
    original, tuned = load_file(tmp_path / "teacher" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(tuned) == set(original)
    changed = {name for name in tuned if not torch.equal(tuned[name], original[name])}
    paths = projection_paths(tiny_model("bert", "sequence-classification"))
    head = {name for name in tuned if name.startswith(("classifier", "bert.pooler"))}
    assert changed == {f"{path}.weight" for path in paths} | head
    matrices = load_file(folder / "adapters" / "lora.safetensors")
    for path in paths:
        update = 2.0 * matrices[f"{path}.B"] @ matrices[f"{path}.A"]
        torch.testing.assert_close(tuned[f"{path}.weight"], original[f"{path}.weight"] + update, atol=1e-6, rtol=0)
    student = weights_of(result.folder)
    assert not [name for name in student if "lora" in name or "base_layer" in name]
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    hidden = [line["distill/hidden"] for line in lines if "distill/hidden" in line]
    assert len(hidden) == 6
    assert all(0 < value < 4 for value in hidden)
    assert hidden[-1] < hidden[0]
    assert json.loads((result.folder / "evaluation.json").read_text())["thrown_away_parameters"] == 0
    before = (folder / "model.safetensors").read_bytes()
    other = run(lora_recipe(tmp_path, "kd-run", "kd"), console=QUIET)
    assert kept(home) == folder
    assert (folder / "model.safetensors").read_bytes() == before
    assert other.teacher_metrics == result.teacher_metrics


def test_other_adapters_make_another_teacher(tmp_path: Path, home: Path) -> None:
    names = set()
    for lora in ({"rank": RANK}, {"rank": RANK, "alpha": 8.0}, {"rank": RANK, "alpha": 9.0}, {"rank": 2}, None):
        recipe = lora_recipe(tmp_path, method="kd")
        recipe["teacher"]["finetune"]["lora"] = lora
        if lora is None:
            del recipe["teacher"]["finetune"]["lora"]
        prepared = prepare(load_recipe(recipe))
        assert prepared.recipe.teacher is not None
        start = finetune.starting_model(prepared, prepared.recipe.teacher)
        names.add(finetune.teacher_fingerprint(prepared, start))
    assert len(names) == 4, "alpha 8 is what rank 4 gets by itself"


@pytest.mark.parametrize("stop", [9, 11])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    options = {"layer_map": "in_order_random", "redraw": "batch", "dropout": 0.3}
    whole = run(lora_recipe(tmp_path, "whole", **options), console=QUIET)
    monkeypatch.setenv("LAYERDISTILL_HOME", str(tmp_path / "another home"))
    steps = 0
    really = StageTrainer.compute_loss

    def stop_there(self: StageTrainer, *args: Any, **given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == stop:
            raise MemoryError("the machine went down")
        return really(self, *args, **given)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "compute_loss", stop_there)
        with pytest.raises(MemoryError):
            run(lora_recipe(tmp_path, **options), console=QUIET)
    checkpoints = list((tmp_path / "run" / "checkpoints" / "distill").glob("checkpoint-*"))
    assert all((folder / "student.safetensors").exists() for folder in checkpoints)
    assert checkpoints
    result = run(lora_recipe(tmp_path, **options), console=QUIET)
    ours, theirs = weights_of(result.folder), weights_of(whole.folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert result.metrics == whole.metrics


def test_a_run_killed_after_its_stage_merges_again_and_ends_the_same(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(lora_recipe(tmp_path, "whole"), console=QUIET)

    def die(model: nn.Module) -> None:
        raise MemoryError("the machine went down")

    with monkeypatch.context() as patch:
        patch.setattr("layerdistill.methods.lora_ild.merge_adapters", die)
        with pytest.raises(MemoryError):
            run(lora_recipe(tmp_path), console=QUIET)
    assert (tmp_path / "run" / "checkpoints" / "distill" / "finished").is_dir()
    result = run(lora_recipe(tmp_path), console=QUIET)
    ours, theirs = weights_of(result.folder), weights_of(whole.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_curriculum_runs(tmp_path: Path, home: Path) -> None:
    recipe = lora_recipe(tmp_path, curriculum={"start": 1, "mode": "kd_rem"})
    recipe["training"] |= {
        "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 32, "eval_strategy": "epoch",
        "save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "accuracy", "eval_delay": 2,
    }  # fmt: skip
    result = run(recipe, console=QUIET)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    seen = [{name for name in line if name.startswith("distill/")} for line in lines if "loss" in line]
    assert seen == [{"distill/task", "distill/logits"}] * 3 + [{"distill/task", "distill/hidden"}] * 3
    assert [line["step"] for line in lines if "eval_accuracy" in line] == [6], "only what has seen the loss can be best"


def test_adapters_out_of_a_full_fine_tuning(tmp_path: Path, home: Path) -> None:
    recipe = lora_recipe(tmp_path, teacher_adapters="svd")
    del recipe["teacher"]["finetune"]["lora"]
    result = run(recipe, console=QUIET)
    folder = kept(home)
    original, tuned = load_file(tmp_path / "teacher" / "model.safetensors"), load_file(folder / "model.safetensors")
    matrices = load_file(folder / "adapters" / f"svd-{RANK}" / "svd.safetensors")
    for path in projection_paths(tiny_model("bert", "sequence-classification")):
        update = (tuned[f"{path}.weight"] - original[f"{path}.weight"]).double()
        u, s, vt = torch.linalg.svd(update)
        best = u[:, :RANK] @ torch.diag(s[:RANK]) @ vt[:RANK]
        found = matrices[f"{path}.B"].double() @ matrices[f"{path}.A"].double()
        torch.testing.assert_close(found, best, atol=1e-6, rtol=1e-3)
    assert result.metrics
    before = (folder / "adapters" / f"svd-{RANK}" / "svd.safetensors").stat().st_mtime_ns
    run({**recipe, "output": str(tmp_path / "again")}, console=QUIET)
    assert (folder / "adapters" / f"svd-{RANK}" / "svd.safetensors").stat().st_mtime_ns == before


def peft_teacher(model: nn.Module) -> PeftModel:
    """A teacher with LoRA as a user makes it: peft's own call, with B that is not 0."""
    with seeded(0, "teacher"):
        wrapped = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=8, target_modules=projection_paths(model), task_type="SEQ_CLS")
        )
        for layer in adapted_layers(wrapped).values():
            nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    return wrapped.eval()


def test_a_peft_folder_is_merged_into_the_teacher(tmp_path: Path) -> None:
    recipe = lora_recipe(tmp_path)
    del recipe["teacher"]["finetune"]
    wrapped = peft_teacher(tiny_model("bert", "sequence-classification", seed=5))
    wrapped.save_pretrained(tmp_path / "lora")
    recipe["teacher"]["adapters"] = str(tmp_path / "lora")
    prepared = prepare(load_recipe(recipe))
    teacher = finetune.load_teacher(prepared, lambda where: pytest.fail("nothing is trained"), QUIET)
    assert teacher.model is not None and teacher.adapters is not None
    assert set(teacher.adapters) == set(prepared.pair.teacher_adapters or ())
    batch = tiny_batch(teacher.model)
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(**batch).logits, wrapped(**batch).logits, atol=1e-5, rtol=0)
    assert run(recipe, console=QUIET).metrics


def test_recipes_that_cannot_work_are_refused_before_anything_is_trained(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "run_stage", lambda *given, **more: pytest.fail("nothing is trained"))
    recipe = lora_recipe(tmp_path)
    with pytest.raises(UserError, match=r"method\.rank is 4, but the teacher's adapters have rank 2"):
        run(recipe, ["teacher.finetune.lora.rank=2"], console=QUIET)
    with pytest.raises(UserError, match="takes adapters out of a full fine-tuning"):
        run(recipe, ["method.teacher_adapters=svd"], console=QUIET)
    with pytest.raises(UserError, match=r"teacher\.finetune\.lora is \{'rank': 0\}"):
        run(recipe, ["teacher.finetune.lora.rank=0"], console=QUIET)
    del recipe["teacher"]["finetune"]
    with pytest.raises(UserError, match="the teacher has none"):
        run(recipe, console=QUIET)
    with pytest.raises(UserError, match="no folder with adapter_config"):
        run(recipe, [f"teacher.adapters={tmp_path / 'data'}"], console=QUIET)


def test_distill_takes_a_peft_model_and_leaves_it_alone(tmp_path: Path) -> None:
    teacher = peft_teacher(tiny_model("bert", "sequence-classification", num_layers=4, seed=1))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = tiny_model("bert", "sequence-classification", num_layers=2, hidden_size=16, seed=2)
    keys = set(student.state_dict())
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path), max_steps=8, learning_rate=5e-3, use_cpu=True, logging_steps=1, disable_tqdm=True
    )
    result = ld.distill(
        teacher, student, toy_dataset("sequence-classification", 32), method="lora_ild", rank=RANK,
        processing_class=toy_tokenizer(), args=args,
    )  # fmt: skip
    assert set(result.student.state_dict()) == keys
    assert teacher.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    hidden = [line["distill/hidden"] for line in lines if "distill/hidden" in line]
    assert hidden[-1] < hidden[0]
    plain = tiny_model("bert", "sequence-classification", num_layers=4)
    with pytest.raises(UserError, match="the teacher has none"):
        ld.distill(plain, student, [], method="lora_ild", processing_class=toy_tokenizer())


def test_a_peft_teacher_and_the_same_one_merged_teach_the_same() -> None:
    losses = []
    for merged in (False, True):
        wrapped = peft_teacher(tiny_model("bert", "sequence-classification", num_layers=4, seed=1))
        student = tiny_model("bert", "sequence-classification", num_layers=2, hidden_size=16, seed=2)
        pair = make_pair(wrapped, student, seed=3)
        assert pair.teacher is not None
        if merged:
            merge_adapters(pair.teacher)
        stage, _ = first_stage(pair)
        batch = ToyCollator("sequence-classification")(list(toy_dataset("sequence-classification", 8)))
        term = hidden_term(stage)
        needs = term.needs(Progress())
        signal = student_signal(student, batch, (), needs.student_taps)
        losses.append(term(signal, LiveTeacher(pair.teacher).signal(batch, needs), batch, Progress())["hidden"].value)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=0)
