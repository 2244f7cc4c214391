"""LoRAILD: its loss from real models against loops in float64, what is refused, and whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn
from toy import ToyCollator, toy_dataset
from toy_recipe import toy_recipe, toy_tokenizer
from transformers import RobertaConfig

import layerdistill as ld
from layerdistill import finetune
from layerdistill.api import make_pair
from layerdistill.core.errors import UserError
from layerdistill.core.seeds import seeded
from layerdistill.core.types import LayerRef, Pair, Progress, Stage
from layerdistill.methods.adapter_term import AdapterTerm
from layerdistill.methods.lora_ild import METHOD, LoraIldConfig, adapter_maps
from layerdistill.models import empty_model
from layerdistill.models.adapters import adapted_layers, adapter_matrices, empty_adapters, merge_adapters
from layerdistill.models.projections import find_projections, projection_paths
from layerdistill.prepare import prepare
from layerdistill.recipe import load_recipe
from layerdistill.runner import run
from layerdistill.signals import LiveTeacher, student_signal
from layerdistill.train.trainer import StageTrainer

QUIET = Console(quiet=True)
RANK = 4


class Context:
    """As much of a run's context as this method asks for."""

    epochs = 3


def config(**options: Any) -> LoraIldConfig:
    return LoraIldConfig(**{"rank": RANK, "dropout": 0.0, **options})


def adapters_of(teacher: nn.Module, rank: int = RANK, seed: int = 5) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = empty_adapters(teacher, rank)
    return {path: torch.randn(shape.shape, generator=draw) for path, shape in shapes.items()}


def toy_pair(family: str = "bert", blocks: tuple[int, int] = (4, 2), adapters: bool = True) -> Pair:
    head = "causal-lm" if family in ("gpt2", "llama") else "sequence-classification"
    teacher = tiny_model(family, head, num_layers=blocks[0], hidden_size=32, seed=1)
    student = tiny_model(family, head, num_layers=blocks[1], hidden_size=16, seed=2)
    pair = make_pair(teacher, student, seed=3)
    return replace(pair, teacher_adapters=adapters_of(teacher)) if adapters else pair


def first_stage(pair: Pair, **options: Any) -> tuple[Stage, Iterator[Stage]]:
    stages = METHOD.stages(pair, config(**options), Context())
    return next(stages), stages


def finish(stages: Iterator[Stage]) -> None:
    assert next(stages, None) is None


def hidden_term(stage: Stage) -> AdapterTerm:
    return next(term for term in stage.terms if isinstance(term, AdapterTerm))


def a_inputs(model: nn.Module, batch: Mapping[str, Tensor], paths: list[str]) -> dict[str, Tensor]:
    """What enters each projection in a plain forward pass, by our own hooks."""
    found: dict[str, Tensor] = {}

    def keep(path: str, args: tuple[Any, ...]) -> None:
        found.setdefault(path, args[0])

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: keep(path, args))
        for path in paths
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


# The equation


@pytest.mark.parametrize("include_padding", [False, True])
@pytest.mark.parametrize(("layer_map", "groups"), [("forward", [[1], [3]]), ("average", [[0, 1], [2, 3]])])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_loss_is_the_papers(family: str, layer_map: str, groups: list[list[int]], include_padding: bool) -> None:
    pair = toy_pair(family)
    assert pair.teacher is not None and pair.teacher_adapters is not None
    batch = tiny_batch(pair.student)
    stage, _ = first_stage(pair, layer_map=layer_map, include_padding=include_padding)
    term = hidden_term(stage)
    needs = term.needs(Progress())
    student = student_signal(pair.student.eval(), batch, (), needs.student_taps)
    teacher = LiveTeacher(pair.teacher).signal(batch, needs)
    mean = term(student, teacher, batch, Progress())["hidden"]

    ours = {path: a for path, (a, _) in adapter_matrices(pair.student).items()}
    blocks = {"s": find_projections(pair.student)[""], "t": find_projections(pair.teacher)[""]}
    inputs_s = a_inputs(pair.student, batch, list(ours))
    inputs_t = a_inputs(pair.teacher, batch, list(pair.teacher_adapters))
    rows, columns = batch["input_ids"].shape
    total = 0.0
    for row in range(rows):
        for place in range(columns):
            if not include_padding and not batch["attention_mask"][row, place]:
                continue
            u_s, u_t = [], []
            for number, group in enumerate(groups):
                for role, path in blocks["s"][number].items():
                    u_s.append(ours[path].double() @ inputs_s[path][row, place].double())
                    theirs = [blocks["t"][block][role] for block in group]
                    each = [pair.teacher_adapters[p].double() @ inputs_t[p][row, place].double() for p in theirs]
                    u_t.append(sum(each) / len(each))
            s, t = torch.cat(u_s), torch.cat(u_t)
            assert len(s) == len(t) == 2 * RANK * (3 if family == "bert" else 1)
            total += ((t / t.norm() - s / s.norm()) ** 2).sum().item()
    tokens = int(batch["attention_mask"].sum())
    if include_padding:
        assert mean.value.item() == pytest.approx(total / (rows * columns), rel=1e-4)
        assert (mean.count, term.unit("hidden")) == (rows, "example")
    else:
        assert mean.value.item() == pytest.approx(total / tokens, rel=1e-4)
        assert (mean.count, term.unit("hidden")) == (tokens, "token")
    assert term.coefficient("hidden", Progress()) == pytest.approx(1 / 3)


def test_both_stacks_of_an_encoder_decoder_count_half() -> None:
    pair = toy_pair("bart", (2, 1))
    stage, stages = first_stage(pair)
    term = hidden_term(stage)
    batch = tiny_batch(pair.student)
    needs = term.needs(Progress())
    student = student_signal(pair.student, batch, (), needs.student_taps)
    assert pair.teacher is not None
    means = term(student, LiveTeacher(pair.teacher).signal(batch, needs), batch, Progress())
    assert set(means) == {"hidden/encoder", "hidden/decoder"}
    assert term.unit("hidden/decoder") == "decoder_token"
    assert {term.coefficient(name, Progress()) for name in means} == {1 / 6}
    assert all(0 < mean.value < 4 for mean in means.values())
    finish(stages)


def test_a_student_with_the_teachers_weights_and_adapters_has_no_distance() -> None:
    teacher = tiny_model("bert", "sequence-classification", num_layers=2, seed=1)
    student = ld.make_student(teacher)
    pair = replace(make_pair(teacher, student), teacher_adapters=adapters_of(teacher))
    stage, _ = first_stage(pair)
    for path, layer in adapted_layers(student).items():
        layer.lora_A["default"].weight.data = pair.teacher_adapters[path].clone()
    term, batch = hidden_term(stage), tiny_batch(student)
    needs = term.needs(Progress())
    signal = student_signal(student, batch, (), needs.student_taps)
    mean = term(signal, LiveTeacher(teacher).signal(batch, needs), batch, Progress())["hidden"]
    assert mean.value.item() == pytest.approx(0.0, abs=1e-10)


def test_the_students_side_sees_dropout_while_training_and_the_teachers_does_not() -> None:
    pair = toy_pair()
    stage, _ = first_stage(pair, dropout=0.5)
    term, batch = hidden_term(stage), tiny_batch(pair.student)
    needs = term.needs(Progress())
    pair.student.train()
    assert pair.teacher is not None
    source = LiveTeacher(pair.teacher)
    teachers = [source.signal(batch, needs) for _ in range(2)]
    students = [student_signal(pair.student, batch, (), needs.student_taps) for _ in range(2)]
    for tap in needs.teacher_taps:
        assert torch.equal(teachers[0].taps[tap], teachers[1].taps[tap])
    for tap in needs.student_taps:
        assert not torch.equal(students[0].taps[tap], students[1].taps[tap])


# Maps


def test_the_fixed_map_is_the_papers() -> None:
    pair = Pair(None, nn.Identity(), "sequence-classification", {"": 24}, {"": 6}, {"": 1024}, {"": 768}, None, 0)
    fixed = adapter_maps(config(), pair)[0]
    assert {student - 1: teacher - 1 for student, teacher in fixed.pairs} == {0: 3, 1: 7, 2: 11, 3: 15, 4: 19, 5: 23}
    average = adapter_maps(config(layer_map="average"), pair)[0]
    assert [tuple(block - 1 for block in group) for _, group in average.groups] == [
        tuple(range(4 * n, 4 * n + 4)) for n in range(6)
    ]
    for redraw, places in (("epoch", [(0, 9), (1, 9)]), ("batch", [(0, 1), (0, 2)])):
        drawn = adapter_maps(config(layer_map="in_order_random", redraw=redraw), pair)[0]
        targets = [[teacher for _, teacher in drawn.at(*place)] for place in places]
        assert targets[0] != targets[1]
        assert all(group == sorted(set(group)) and len(group) == 6 for group in targets)


def test_a_redrawn_map_changes_what_is_asked_of_the_teacher() -> None:
    pair = toy_pair(blocks=(4, 1))
    stage, _ = first_stage(pair, layer_map="in_order_random", redraw="epoch")
    term = hidden_term(stage)
    asked = {term.needs(Progress(epoch=epoch)).teacher_taps for epoch in range(12)}
    assert len(asked) > 1
    assert all(len(taps) == 3 for taps in asked)
    assert all(term.maps[0].refs_at(epoch, 0)[0][0] == LayerRef("", 1) for epoch in range(3))


# The stage


@pytest.mark.parametrize("train", ["full", "adapters"])
def test_what_trains_and_what_is_left(train: str) -> None:
    pair = toy_pair()
    pair.student.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    keys = list(pair.student.state_dict())
    flags = {name: parameter.requires_grad for name, parameter in pair.student.named_parameters()}
    plain = set(flags)
    stage, stages = first_stage(pair, train=train)
    assert not stage.stock
    assert stage.student is pair.student
    assert not list(stage.terms.parameters()), "nothing serves the training only"
    assert not stage.terms.state_dict(), "the teacher's adapters are no part of a checkpoint"
    training = {name for name, parameter in pair.student.named_parameters() if parameter.requires_grad}
    lora = {name for name, _ in pair.student.named_parameters() if ".lora_" in name}
    assert len(lora) == 2 * 3 * 2
    assert lora <= training
    if train == "full":
        assert {name.replace(".base_layer", "") for name in training - lora} == plain - {
            "bert.embeddings.position_embeddings.weight"
        }
    else:
        assert {name.split(".")[0] for name in training - lora} == {"classifier", "bert"}
        assert all("classifier" in name or "pooler" in name for name in training - lora)
    finish(stages)
    assert list(pair.student.state_dict()) == keys
    assert {name: parameter.requires_grad for name, parameter in pair.student.named_parameters()} == flags


def test_the_control_has_the_same_student_and_no_adapters_of_a_teacher() -> None:
    pair = toy_pair(adapters=False)
    weights = {"task": 0.5, "logits": 0.5, "hidden": 0.0}
    assert METHOD.problems(config(weights=weights), pair) == []
    stage, stages = first_stage(pair, weights=weights)
    assert [term.name for term in stage.terms] == ["task", "logits"]
    with_ild = toy_pair()
    first_stage(with_ild)
    ours, theirs = (adapter_matrices(model) for model in (pair.student, with_ild.student))
    assert all(torch.equal(ours[path][0], theirs[path][0]) for path in theirs), "the same draw"
    finish(stages)


def test_a_curriculum_begins_in_its_epoch() -> None:
    stage, _ = first_stage(toy_pair(), curriculum={"start": 1, "mode": "kd_rem"})
    assert [term.name for term in stage.terms] == ["task", "logits", "hidden"]
    found = [[term.coefficient(term.name, Progress(epoch=epoch)) for term in stage.terms] for epoch in (0, 1)]
    assert found == [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]
    assert not stage.terms[2].needs(Progress(epoch=0)).teacher_at_all
    with pytest.raises(UserError, match="start is 3, but the training has 3 epochs"):
        first_stage(toy_pair(), curriculum={"start": 3})


# Refusals


def problem(pair: Pair, **options: Any) -> str:
    found = METHOD.problems(config(**options), pair)
    assert len(found) == 1, found
    with pytest.raises(UserError):
        first_stage(pair, **options)
    assert not adapted_layers(pair.student), "the student is untouched"
    return found[0]


def test_what_cannot_be_compared_is_refused() -> None:
    pair = toy_pair()
    assert METHOD.problems(config(), pair) == []
    found = problem(pair, rank=8)
    assert "method.rank is 8" in found and "have rank 4" in found
    for words in ("lora: {rank: 4}", "teacher.adapters", "svd", "PeftModel", "hidden: 0"):
        assert words in problem(replace(pair, teacher_adapters=None))
    some = {path: a for path, a in pair.teacher_adapters.items() if "key" not in path}
    assert "has no adapter at bert.encoder.layer.0.attention.self.key (4 such" in problem(
        replace(pair, teacher_adapters=some)
    )
    fused = tiny_model("modernbert", "sequence-classification", num_layers=4, seed=1)
    other = replace(make_pair(fused, pair.student), teacher_adapters=adapters_of(fused))
    assert "student's projections are query, key, value, the teacher's Wqkv" in problem(other)
    for layer_map in ([[0, 1]], [["final", 4]], [[1, 0]]):
        assert "have no projections" in problem(pair, layer_map=layer_map)
    assert "but must be from 0 to 4" in problem(pair, layer_map=[[1, 5]])
    assert "Leave one out" in problem(pair, weights={"hidden": 1.0}, curriculum={"start": 1})
    assert "all 0" in problem(pair, weights={"task": 0, "logits": 0, "hidden": 0})
    regression = replace(pair, task="regression")
    assert "logits_loss" in problem(regression, logits_loss="forward_kl")


def test_a_recipe_is_checked_before_any_model_is_there() -> None:
    shapes = empty_adapters(tiny_model("bert"), 8)
    bare = Pair(None, nn.Identity(), "sequence-classification", {"": 4}, {"": 2}, {"": 32}, {"": 16}, None, 0, shapes)
    assert METHOD.problems(config(rank=8), bare) == []
    assert "have rank 8" in METHOD.problems(config(), bare)[0]


def test_the_preview_counts_what_the_adapters_add() -> None:
    student = RobertaConfig(num_hidden_layers=6, hidden_size=768, num_attention_heads=12)
    teacher = RobertaConfig(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16)
    models = [empty_model(shape, "sequence-classification", 2) for shape in (teacher, student)]
    pair = Pair(*models, "sequence-classification", {"": 24}, {"": 6}, {"": 1024}, {"": 768}, None, 0)
    pair = replace(pair, teacher_adapters=empty_adapters(models[0], 32))
    preview = METHOD.preview(pair, LoraIldConfig())[0]
    assert "884,736 parameters" in preview.notes[0]
    assert "18 projections" in preview.notes[0]
    assert preview.thrown_away == 0
    assert preview.maps[0].pairs[-1] == (6, 24)
    assert preview.terms == ["0.333333 × task", "0.333333 × logits", "0.333333 × hidden"]
    later = METHOD.preview(pair, LoraIldConfig(curriculum={"start": 4}))[0]
    assert later.terms[2] == "0 × hidden (0.333 from epoch 4)"


# Whole runs


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
