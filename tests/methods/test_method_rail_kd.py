"""RAIL-KD: its equation, its published parameter counts, its draws, what is trained, and an exact resume."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from term_references import MASK, pair_of, signal, states, times
from tiny_models import tiny_model
from torch import Tensor, nn
from toy import ToyCollator, toy_dataset

from layerdistill.core.types import LayerRef, Needs, Pair, Progress, Signal
from layerdistill.methods.pooled_term import PooledTerm
from layerdistill.methods.rail_kd import METHOD, RailKdConfig
from layerdistill.models import depths, make_student, widths
from layerdistill.signals import LiveTeacher
from layerdistill.train.stage import StageInput, run_stage

LARGE_TO_BASE = Pair(
    None, nn.Identity(), "sequence-classification", {"": 24}, {"": 6}, {"": 1024}, {"": 768}, None, seed=13
)
"""The shapes of roberta-large and distilroberta-base."""

FORWARD = {"layer_map": "forward", "projection_size": 3}


def hidden(pair: Pair | None = None, **options: Any) -> PooledTerm:
    stages = list(METHOD.stages(pair or pair_of(), RailKdConfig(**options)))
    assert [stage.name for stage in stages] == ["distill"]
    assert [term.name for term in stages[0].terms] == ["task", "logits", "hidden"]
    return stages[0].terms[-1]


def refs(*numbers: int) -> frozenset[LayerRef]:
    return frozenset(LayerRef("", number) for number in numbers)


def pooled(hidden_states: Tensor, padded: bool = False) -> list[list[float]]:
    rows = []
    for text in range(MASK.shape[0]):
        places = [place for place in range(MASK.shape[1]) if padded or MASK[text, place]]
        row = [hidden_states[text, place].double().tolist() for place in places]
        rows.append([sum(column) / len(places) for column in zip(*row, strict=True)])
    return rows


def mapped(rows: list[list[float]], linear: Any) -> list[list[float]]:
    bias = linear.bias.tolist() if getattr(linear, "bias", None) is not None else [0.0] * linear.weight.shape[0]
    return [[x + b for x, b in zip(row, bias, strict=True)] for row in times(rows, linear.weight.double().tolist())]


def distance(student: list[list[float]], teacher: list[list[float]], power: int) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        lengths = [math.sqrt(sum(x * x for x in side)) for side in (s, t)]
        total += math.sqrt(sum((a / lengths[0] - b / lengths[1]) ** 2 for a, b in zip(s, t, strict=True))) ** power
    return total / len(student)


def averaged(said: Signal) -> Signal:
    """What a teacher source gives besides: the mean of each layer over each example's real tokens."""
    averages = {
        layer: torch.stack([state[row][mask == 1].mean(0) for row, mask in enumerate(said.masks[layer.stack])])
        for layer, state in said.hidden.items()
    }
    return replace(said, averages=averages)


def disturbed(term: PooledTerm) -> PooledTerm:
    """The term with biases that are not 0, so that a forgotten one shows."""
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.add_(0.1)
    return term


# Published facts


@pytest.mark.parametrize(("form", "discarded"), [("layerwise", 934_848), ("concatenated", 344_128)])
def test_the_published_numbers_of_discarded_parameters(form: str, discarded: int) -> None:
    """u = 32, 24 blocks of 1024 to 6 of 768 (LoRAILD's released code)."""
    (preview,) = METHOD.preview(LARGE_TO_BASE, RailKdConfig(form=form))
    assert preview.thrown_away == discarded
    term = hidden(LARGE_TO_BASE, form=form)
    expected = (24, 6) if form == "layerwise" else (1, 1)
    assert (len(term.teacher_maps["only"].maps), len(term.student_maps["only"].maps)) == expected


@pytest.mark.parametrize("form", ["layerwise", "concatenated"])
def test_a_map_drawn_once_has_maps_for_what_it_drew_only(form: str) -> None:
    term = hidden(LARGE_TO_BASE, form=form, redraw="run")
    drawn = {teacher for layer_map in term.maps for _, group in layer_map.refs_at(7, 99) for teacher in group}
    assert set(term.teacher_maps["only"].layers) == drawn
    assert len(drawn) == 6


def test_the_defaults_are_those_of_the_runs() -> None:
    config = RailKdConfig()
    assert (config.layer_map, config.redraw, config.temperature) == ("in_order_random", "epoch", 1.0)
    assert (config.projection_size, config.squared, config.train_teacher_maps) == (32, True, True)
    assert config.weights.task == config.weights.logits == config.weights.hidden == 1 / 3


def test_plan_says_that_the_map_changes_and_counts_per_pair() -> None:
    (preview,) = METHOD.preview(LARGE_TO_BASE, RailKdConfig())
    assert list(preview.terms) == ["0.333333 × task", "0.333333 × logits", "0.0555556 × hidden per pair"]
    assert list(preview.notes) == ["The layer map is drawn anew for each epoch; this is the first."]
    (preview,) = METHOD.preview(LARGE_TO_BASE, RailKdConfig(form="concatenated", layer_map="forward"))
    assert preview.terms[-1] == "0.333333 × hidden"
    assert list(preview.notes) == []


# The equation


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_layerwise_against_the_equation(squared: bool, padded: bool, trained: bool) -> None:
    term = disturbed(hidden(**FORWARD, squared=squared, include_padding=padded, train_teacher_maps=trained))
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    if padded:
        ours, theirs = ({layer: each.nan_to_num(0.5) for layer, each in side.items()} for side in (ours, theirs))
    means = term(signal(ours), averaged(signal(theirs)), {}, Progress())
    assert list(means) == ["hidden/1-2", "hidden/2-4"]
    for student, teacher in ((1, 2), (2, 4)):
        s = mapped(pooled(ours[LayerRef("", student)], padded), term.student_maps["only"].maps[str(student)])
        t = mapped(pooled(theirs[LayerRef("", teacher)], padded), term.teacher_maps["only"].maps[str(teacher)])
        mean = means[f"hidden/{student}-{teacher}"]
        assert mean.value.item() == pytest.approx(distance(s, t, 2 if squared else 1), rel=1e-5)
        assert mean.count.item() == 3
        assert term.unit(f"hidden/{student}-{teacher}") == "example"
    assert term.coefficient("hidden/1-2", Progress()) == pytest.approx(1 / 6)
    assert hidden(**FORWARD, reduce="sum").coefficient("hidden/1-2", Progress()) == pytest.approx(1 / 3)


@pytest.mark.parametrize("strategy", ["forward", "average", "reverse"])
def test_concatenated_against_the_equation(strategy: Any) -> None:
    term = disturbed(hidden(layer_map=strategy, projection_size=3, form="concatenated"))
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    means = term(signal(ours), averaged(signal(theirs)), {}, Progress())
    assert list(means) == ["hidden"]
    groups = {"forward": [[2], [4]], "average": [[1, 2], [3, 4]], "reverse": [[4], [2]]}[strategy]
    s = [one + two for one, two in zip(*(pooled(ours[LayerRef("", k)]) for k in (1, 2)), strict=True)]
    averages = [
        [[sum(x) / len(x) for x in zip(*row, strict=True)] for row in zip(*each, strict=True)]
        for each in ([pooled(theirs[LayerRef("", layer)]) for layer in group] for group in groups)
    ]
    t = [one + two for one, two in zip(*averages, strict=True)]
    (student_map,), (teacher_map,) = (
        list(side["only"].maps.values()) for side in (term.student_maps, term.teacher_maps)
    )
    assert student_map.weight.shape == (3, 8)
    assert teacher_map.weight.shape == (3, 12)
    assert means["hidden"].value.item() == pytest.approx(
        distance(mapped(s, student_map), mapped(t, teacher_map), 2), rel=1e-5
    )
    assert term.coefficient("hidden", Progress()) == pytest.approx(1 / 3)


def test_a_group_is_compared_with_the_mean_of_its_mapped_averages() -> None:
    term = disturbed(hidden(layer_map="average", projection_size=3))
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    means = term(signal(ours), averaged(signal(theirs)), {}, Progress())
    assert list(means) == ["hidden/1-1..2", "hidden/2-3..4"]
    first, second = (
        mapped(pooled(theirs[LayerRef("", layer)]), term.teacher_maps["only"].maps[str(layer)]) for layer in (1, 2)
    )
    target = [[(a + b) / 2 for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]
    s = mapped(pooled(ours[LayerRef("", 1)]), term.student_maps["only"].maps["1"])
    assert means["hidden/1-1..2"].value.item() == pytest.approx(distance(s, target, 2), rel=1e-5)


@pytest.mark.parametrize("form", ["layerwise", "concatenated"])
def test_two_stacks_have_maps_and_masks_of_their_own(form: str) -> None:
    depth = {"encoder": 4, "decoder": 4}, {"encoder": 2, "decoder": 2}
    width = {"encoder": 6, "decoder": 6}, {"encoder": 4, "decoder": 4}
    pair = Pair(None, nn.Identity(), "sequence-classification", *depth, *width, None, 0)
    term = hidden(pair, **FORWARD, form=form)
    masks = {"encoder": MASK, "decoder": MASK.flip(0)}
    sides = []
    for features, layers, seed in ((4, 2, 1), (6, 4, 2)):
        made = {
            LayerRef(stack, layer.number): each.nan_to_num(9.0)
            for stack in masks
            for layer, each in states(features, layers, seed).items()
        }
        sides.append(averaged(Signal(None, made, masks)))
    means = term(*sides, {}, Progress())
    if form == "layerwise":
        assert list(means) == ["hidden/encoder.1-2", "hidden/encoder.2-4", "hidden/decoder.1-2", "hidden/decoder.2-4"]
        encoder, decoder = means["hidden/encoder.1-2"], means["hidden/decoder.1-2"]
        assert term.coefficient("hidden/encoder.1-2", Progress()) == pytest.approx(1 / 12)
    else:
        assert list(means) == ["hidden/encoder", "hidden/decoder"]
        encoder, decoder = means["hidden/encoder"], means["hidden/decoder"]
        assert term.coefficient("hidden/encoder", Progress()) == pytest.approx(1 / 6)
    assert encoder.value.item() != decoder.value.item()


# What is drawn, and what is trained


def test_each_epoch_asks_for_its_own_six_teacher_layers_and_all_have_a_map() -> None:
    term = hidden(LARGE_TO_BASE)
    asked = []
    for epoch in range(12):
        needs = term.needs(Progress(epoch, 100 * epoch))
        assert needs == Needs(student=refs(1, 2, 3, 4, 5, 6), teacher_averages=needs.teacher_averages)
        assert len(needs.teacher_averages) == 6
        assert needs == hidden(LARGE_TO_BASE).needs(Progress(epoch, 7)), "a function of the seed and the epoch"
        asked.append(needs.teacher_averages)
    assert len(set(asked)) > 8
    assert frozenset().union(*asked) <= set(term.teacher_maps["only"].layers) == refs(*range(1, 25))


def test_a_fixed_map_has_maps_for_the_layers_it_names_only() -> None:
    assert hidden(**FORWARD).teacher_maps["only"].layers == (LayerRef("", 2), LayerRef("", 4))
    with_embeddings = hidden(embeddings=True).teacher_maps["only"].layers
    assert with_embeddings == tuple(LayerRef("", number) for number in range(5))


def test_redraw_is_left_out_where_nothing_is_drawn() -> None:
    assert RailKdConfig(layer_map="forward").redraw == "run"
    assert RailKdConfig(layer_map=[(1, 2)]).redraw == "run"
    assert RailKdConfig(layer_map="random").redraw == "epoch"
    config = RailKdConfig(layer_map="average")
    assert RailKdConfig.model_validate(config.model_dump()) == config
    problems = METHOD.problems(RailKdConfig(layer_map="forward", redraw="batch"), pair_of())
    assert any("redraw is 'batch', but layer_map 'forward' draws nothing" in problem for problem in problems)


def test_gradients_reach_the_maps_that_are_used_and_never_the_teacher() -> None:
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    for tensor in (*ours.values(), *theirs.values()):
        tensor.requires_grad_()
    term = hidden(projection_size=3)
    means = term(signal(ours), averaged(signal(theirs)), {}, Progress())
    sum(mean.value for mean in means.values()).backward()
    drawn = {str(layer) for layer in term.needs(Progress()).teacher_averages}
    touched = {name for name, linear in term.teacher_maps["only"].maps.items() if linear.weight.grad is not None}
    assert touched == drawn
    assert len(drawn) == 2
    assert all(linear.weight.grad.any() for linear in term.student_maps["only"].maps.values())
    assert all(tensor.grad is None for tensor in theirs.values())
    assert ours[LayerRef("", 1)].grad[MASK == 1].any()
    frozen = hidden(projection_size=3, train_teacher_maps=False)
    assert {name.split(".")[0] for name, _ in frozen.named_parameters()} == {"student_maps"}
    assert {name.split(".")[0] for name, _ in frozen.named_buffers()} == {"teacher_maps"}


def test_trained_teacher_maps_can_give_the_match_away_and_frozen_ones_cannot() -> None:
    """Both sides map everything to one direction: the loss is 0 and the student has learned nothing."""
    draw = torch.Generator().manual_seed(0)
    mask = torch.ones(64, 1, dtype=torch.long)
    sides = [
        averaged(
            Signal(None, {LayerRef("", k): torch.randn(64, 1, width, generator=draw) for k in range(1, 5)}, {"": mask})
        )
        for width in (4, 6)
    ]
    left = {}
    for trained in (True, False):
        term = hidden(**FORWARD, train_teacher_maps=trained)
        optimizer = torch.optim.Adam(term.parameters(), lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            loss = torch.stack([mean.value for mean in term(*sides, {}, Progress()).values()]).mean()
            loss.backward()
            optimizer.step()
        left[trained] = loss.item()
    assert left[True] < 0.1, "unrelated random states look matched"
    assert left[False] > 0.8


def test_maps_are_drawn_from_the_seed_and_the_sides_differ() -> None:
    pairs = [pair_of(widths=(4, 4), seed=seed) for seed in (0, 0, 1)]
    terms = [hidden(pair, **FORWARD) for pair in pairs]
    ours = [term.student_maps["only"].maps["2"].weight for term in terms]
    theirs = [term.teacher_maps["only"].maps["2"].weight for term in terms]
    assert torch.equal(ours[0], ours[1])
    assert torch.equal(theirs[0], theirs[1])
    assert not torch.equal(ours[0], ours[2])
    assert not torch.equal(ours[0], theirs[0])


# Refused


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValidationError, match="projection_size"):
        RailKdConfig(projection_size=0)
    with pytest.raises(ValidationError, match="form"):
        RailKdConfig(form="pooled")
    deeper = Pair(None, nn.Identity(), "regression", {"": 2}, {"": 4}, {"": 6}, {"": 6}, None, 0)
    problems = METHOD.problems(RailKdConfig(logits_loss="forward_kl", weights={"hidden": 0.0}), deeper)
    assert len(problems) == 3
    assert any("student has 4 blocks and the teacher 2" in problem for problem in problems)
    assert METHOD.problems(RailKdConfig(), pair_of()) == []


# A whole run


def train(folder: Path, form: str) -> dict[str, Tensor]:
    """Twelve steps, three epochs, with a checkpoint every five; returns what the stage ended with."""
    teacher = tiny_model("bert", "sequence-classification", num_layers=6, hidden_size=16, num_heads=2, seed=1)
    student = make_student(teacher, num_blocks=2)
    config = RailKdConfig(form=form, projection_size=4)
    pair = Pair(
        teacher, student, "sequence-classification", depths(teacher), depths(student), widths(teacher),
        widths(student), None, 5,
    )  # fmt: skip
    given = StageInput(
        pair.task, {"train": toy_dataset(pair.task, size=32)}, ToyCollator(pair.task), None,
        {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True,
         "save_steps": 5, "save_total_limit": 9, "logging_steps": 4, "lr_scheduler_type": "constant"},
        5, folder, Console(quiet=True),
    )  # fmt: skip
    for stage in METHOD.stages(pair, config):
        run_stage(stage, given, LiveTeacher(teacher))
    ended = folder / "checkpoints" / "distill" / "finished"
    return {**load_file(ended / "model.safetensors"), **load_file(ended / "helpers.safetensors")}


@pytest.mark.parametrize("form", ["layerwise", "concatenated"])
def test_a_run_that_goes_on_in_the_second_epoch_ends_bit_for_bit_the_same(form: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", form)
    checkpoints = tmp_path / "whole" / "checkpoints" / "distill"
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-12",
        "checkpoint-5",
    ]
    target = tmp_path / "killed" / "checkpoints" / "distill" / "checkpoint-5"
    shutil.copytree(checkpoints / "checkpoint-5", target)
    killed = train(tmp_path / "killed", form)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    log = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert "distill/hidden" in log
