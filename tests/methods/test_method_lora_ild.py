"""LoRAILD: its loss from real models against loops in float64, what is refused, and whole runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from lora_cases import RANK, adapters_of, config, finish, first_stage, hidden_term, toy_pair
from rich.console import Console
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import RobertaConfig

import layerdistill as ld
from layerdistill.api import make_pair
from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef, Pair, Progress
from layerdistill.methods.lora_ild import METHOD, LoraIldConfig, adapter_maps
from layerdistill.models import empty_model
from layerdistill.models.adapters import adapted_layers, adapter_matrices, empty_adapters
from layerdistill.models.projections import find_projections
from layerdistill.signals import LiveTeacher, student_signal

QUIET = Console(quiet=True)


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
