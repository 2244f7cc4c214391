"""Task-aware distillation: its stages, the loss between filtered states, its controls, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ted_cases import ToyContext, run_ted, stage_of, stages_of, toy_pair
from term_references import MASK, draw, pair_of, real, signal, squared_error, states
from tiny_models import tiny_model
from torch import Tensor
from torch.nn import functional
from toy import ToyCollator
from transformers import DebertaV2Config

import layerdistill as ld
from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef, Pair, Progress, Signal
from layerdistill.methods.ted import METHOD, TedConfig
from layerdistill.models import empty_model
from layerdistill.signals import LiveTeacher, student_signal

START = Progress()


def hidden_term(widths: tuple[int, int] = (4, 6), **options: Any) -> Any:
    """The hidden term of a student of 2 blocks and a teacher of 4, its filters anything but their start."""
    options.setdefault("filters", "unlearned")
    term = stages_of(pair_of(widths=widths), finetune_student_first=False, **options)["distill"].terms[-1]
    with torch.no_grad():
        for number, parameter in enumerate(term.parameters()):
            parameter.add_(0.3 * draw(*parameter.shape, seed=number))
    return term


def filtered(module: Any, layer: int, rows: list[list[float]]) -> list[list[float]]:
    """Rows through a linear filter, in Python's float64."""
    chosen = module["only"].maps[str(layer)]
    weight, bias = chosen.weight.tolist(), chosen.bias.tolist()
    return [
        [sum(w * x for w, x in zip(line, row, strict=True)) + b for line, b in zip(weight, bias, strict=True)]
        for row in rows
    ]


# Stages


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["student-finetune", "teacher-filters", "student-filters", "distill"]),
        ({"finetune_student_first": False}, ["teacher-filters", "student-filters", "distill"]),
        ({"filters": "unlearned"}, ["distill"]),
        ({"filters": "none"}, ["distill"]),
        ({"filters": "none", "finetune_student_first": True}, ["student-finetune", "distill"]),
    ],
)
def test_the_stages_and_their_preview(options: Any, names: list[str]) -> None:
    pair = toy_pair("bert")
    assert list(stages_of(pair, **options)) == names
    assert [stage.name for stage in METHOD.preview(pair, TedConfig(**options))] == names


def test_the_filters_that_were_learned_are_those_that_are_used() -> None:
    stages = stages_of(toy_pair("bert"))
    hidden = stages["distill"].terms[-1]
    assert [term.name for term in stages["distill"].terms] == ["task", "logits", "hidden"]
    assert hidden.teacher_filters["only"] is stages["teacher-filters"].terms[0].filters["only"]
    assert hidden.projections["only"] is stages["student-filters"].terms[0].filters["only"]
    assert not any(parameter.requires_grad for parameter in hidden.teacher_filters.parameters())
    assert all(parameter.requires_grad for parameter in hidden.projections.parameters())
    assert [str(layer) for layer in hidden.teacher_filters["only"].layers] == ["2", "4"]


def test_training_arguments_of_the_phases() -> None:
    stages = stages_of(
        toy_pair("bert"),
        student_finetune={"max_steps": 5, "learning_rate": 1e-4},
        stage_one={"num_train_epochs": 6, "warmup_steps": 0, "teacher": {"warmup_steps": 100, "learning_rate": 2e-5}},
    )
    assert stages["student-finetune"].training == {"max_steps": 5, "learning_rate": 1e-4}
    still = {"eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False}
    still["activation_checkpointing"] = False
    shared = {"max_steps": -1, "num_train_epochs": 6.0} | still
    assert stages["student-filters"].training == shared | {"warmup_steps": 0}
    assert stages["teacher-filters"].training == shared | {"warmup_steps": 100, "learning_rate": 2e-5}
    assert stages["distill"].training == {}


def test_the_sizes_of_the_papers_filters_and_heads() -> None:
    shape = {"num_hidden_layers": 12, "vocab_size": 100, "num_attention_heads": 12, "num_labels": 3}
    models = [
        empty_model(DebertaV2Config(hidden_size=width, intermediate_size=4, **shape), "sequence-classification", 3)
        for width in (768, 384)
    ]
    pair = Pair(*models, "sequence-classification", {"": 12}, {"": 12}, {"": 768}, {"": 384}, None, 0)
    found = {stage.name: stage for stage in METHOD.preview(pair, TedConfig())}
    heads = 12 * (768 * 768 + 768 + 768 * 3 + 3)
    assert found["teacher-filters"].thrown_away - heads == 12 * (768 * 768 + 768) == 7_087_104
    assert found["student-filters"].thrown_away - heads == 12 * (384 * 768 + 768) == 3_548_160
    assert "12 filters of the teacher, 7,087,104 parameters" in found["teacher-filters"].notes[0]
    assert f"12 heads, {heads:,} parameters" in found["student-filters"].notes[1]
    assert found["distill"].thrown_away == 3_548_160
    assert "7,087,104" in found["distill"].notes[0]


# The loss between filtered states


@pytest.mark.parametrize("relative", [False, True])
def test_filtered_states_against_the_formula(relative: bool) -> None:
    term = hidden_term(filter_size=5, relative=relative)
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    means = term(signal(ours), signal(theirs), {}, START)
    assert set(means) == {"hidden/1-2", "hidden/2-4"}
    for student, teacher in ((1, 2), (2, 4)):
        x = filtered(term.projections, student, real(ours[LayerRef("", student)]))
        y = filtered(term.teacher_filters, teacher, real(theirs[LayerRef("", teacher)]))
        expected = squared_error(x, y) / (squared_error([[0.0] * 5] * len(y), y) if relative else 1)
        mean = means[f"hidden/{student}-{teacher}"]
        assert mean.value.item() == pytest.approx(expected, rel=1e-4)
        assert mean.count.item() == MASK.sum().item()
        assert (term.unit("hidden/1-2"), term.coefficient("hidden/1-2", START)) == ("token", 0.5)
    sum(mean.total for mean in means.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in term.projections.parameters())
    assert all(parameter.grad is None for parameter in term.teacher_filters.parameters())


def test_without_the_mask_the_loss_is_the_released_one() -> None:
    term = hidden_term(mask_padding=False)
    ours = {LayerRef("", k): draw(3, 5, 4, seed=k) for k in (1, 2)}
    theirs = {LayerRef("", k): draw(3, 5, 6, seed=10 + k) for k in (2, 4)}
    means = term(signal(ours), signal(theirs), {}, START)
    for student, teacher in ((1, 2), (2, 4)):
        s, t = term.projections["only"].maps[str(student)], term.teacher_filters["only"].maps[str(teacher)]
        x = ours[LayerRef("", student)].double() @ s.weight.double().T + s.bias.double()
        y = theirs[LayerRef("", teacher)].double() @ t.weight.double().T + t.bias.double()
        mean = means[f"hidden/{student}-{teacher}"]
        assert mean.value.item() == pytest.approx(functional.mse_loss(x, y).item(), rel=1e-5)
        assert (mean.count.item(), term.unit("hidden/1-2")) == (1, "batch")
    masked = hidden_term()
    masked.load_state_dict(term.state_dict())
    assert masked(signal(ours), signal(theirs), {}, START)["hidden/1-2"].value != means["hidden/1-2"].value
    no_padding = {"": torch.ones_like(MASK)}
    same = [t(Signal(None, ours, no_padding), Signal(None, theirs, no_padding), {}, START) for t in (term, masked)]
    for name in means:
        assert same[0][name].value.item() == pytest.approx(same[1][name].value.item(), rel=1e-6)


def test_without_filters_the_students_states_are_compared_with_the_teachers_own() -> None:
    term = hidden_term(filters="none")
    assert list(term.teacher_filters) == []
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    means = term(signal(ours), signal(theirs), {}, START)
    for student, teacher in ((1, 2), (2, 4)):
        x = filtered(term.projections, student, real(ours[LayerRef("", student)]))
        expected = squared_error(x, real(theirs[LayerRef("", teacher)]))
        assert means[f"hidden/{student}-{teacher}"].value.item() == pytest.approx(expected, rel=1e-4)


def test_a_group_of_teacher_layers_is_averaged_after_the_filters() -> None:
    term = hidden_term(layer_map="average")
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    mean = term(signal(ours), signal(theirs), {}, START)["hidden/1-1..2"]
    x = filtered(term.projections, 1, real(ours[LayerRef("", 1)]))
    both = [filtered(term.teacher_filters, layer, real(theirs[LayerRef("", layer)])) for layer in (1, 2)]
    y = [[(a + b) / 2 for a, b in zip(one, other, strict=True)] for one, other in zip(*both, strict=True)]
    assert mean.value.item() == pytest.approx(squared_error(x, y), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "teachers"),
    [
        ({"layer_map": "in_order_random", "redraw": "batch"}, [1, 2, 3, 4]),
        ({"layer_map": "random", "redraw": "epoch", "embeddings": True}, [0, 2, 4]),
        ({"layer_map": [[1, 1], [2, "final"]]}, [-1, 1]),
    ],
)
def test_every_layer_that_may_be_matched_has_a_filter(options: Any, teachers: list[int]) -> None:
    term = hidden_term(**options)
    assert [layer.number for layer in term.teacher_filters["only"].layers] == teachers
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    for step in range(5):
        assert len(term(signal(ours), signal(theirs), {}, Progress(step, step))) == len(term.groups(START))


def test_a_regression_heads_predictions_are_distilled() -> None:
    pair = toy_pair("bert", "regression")
    stage = stage_of("distill", pair, finetune_student_first=False, filters="unlearned")
    batch = next(ToyContext("regression").training_batches())
    logits = next(term for term in stage.terms if term.name == "logits")
    ours = student_signal(pair.student, batch, [])
    theirs = LiveTeacher(pair.teacher).signal(batch, logits.needs(START))
    value = logits(ours, theirs, batch, START)["logits"].value.item()
    assert value == pytest.approx(functional.mse_loss(ours.logits, theirs.logits).item(), rel=1e-5)
    assert value > 1e-6


# What is refused


def problems(task: str = "sequence-classification", widths: tuple[int, int] = (4, 6), **options: Any) -> list[str]:
    return METHOD.problems(TedConfig(**options), pair_of(task, widths))


def test_what_fits_is_not_refused() -> None:
    assert problems() == []
    assert problems(filter_size=5, nonlinear=True) == []
    assert problems("causal-lm", (6, 6)) == []
    assert problems("causal-lm", filters="unlearned") == []
    assert problems("causal-lm", filters="none") == []
    assert problems(widths=(6, 6), filter_init="identity") == []
    assert problems("regression") == []
    assert problems(filters="none", finetune_student_first=True, weights={"hidden": 0}) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"filters": "none", "filter_size": 5},
            "the student is 4 wide, the teacher 6, the filters 5. Leave method.filter",
        ),
        ({"task": "causal-lm"}, "the student is 4 wide, the teacher 6, the filters 6. Take a student of the teacher's"),
        (
            {"task": "causal-lm", "widths": (6, 6), "filter_size": 5},
            "the student is 6 wide, the teacher 6, the filters 5",
        ),
        ({"filter_init": "identity"}, "needs equal widths, but the student is 4 wide"),
        ({"filter_init": "identity", "nonlinear": True, "widths": (6, 6)}, "a nonlinear filter is none"),
        ({"stage_one": {"max_steps": 3, "num_train_epochs": 1}}, "method.stage_one has num_train_epochs and max_steps"),
        ({"stage_one": {"teacher": {"max_steps": 3, "num_train_epochs": 1}}}, "method.stage_one.teacher has"),
        ({"student_finetune": {"max_steps": 3, "num_train_epochs": 1}}, "method.student_finetune has"),
        ({"weights": {"hidden": 0}}, "plain kd"),
        ({"filters": "none", "weights": {"hidden": 0}}, "plain kd"),
        ({"layer_map": [[3, 1]]}, "method.layer_map"),
        ({"task": "regression", "logits_loss": "forward_kl"}, "silently 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(options: Any, message: str) -> None:
    found = problems(**options)
    assert len(found) == 1
    assert message in found[0]


def test_a_fine_tuned_student_under_plain_kd_is_the_control_with_an_equal_start() -> None:
    stages = stages_of(toy_pair("bert"), filters="none", finetune_student_first=True, weights={"hidden": 0})
    assert [[term.name for term in stage.terms] for stage in stages.values()] == [["task"], ["task", "logits"]]


# Runs


class Killed(Exception):
    """What ends a process here: nothing of it is caught, so the disk is as after a kill."""


class Deadly(ToyCollator):
    """Makes batches until `after` of them were made in one stage."""

    def __init__(self, task: str, stage: str, after: int) -> None:
        super().__init__(task)
        self.stage = stage
        self.after = after
        self.left: int | None = None

    def arm(self, stage: str) -> None:
        self.left = self.after if stage == self.stage else None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed
        return super().__call__(rows)


SHORT = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
OPTIONS: dict[str, Any] = {"training": SHORT, "layer_map": "in_order_random", "redraw": "batch"}


def test_killed_in_every_stage_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    whole, cut = toy_pair("bert"), tmp_path / "cut"
    stages = run_ted(whole, tmp_path / "whole", **OPTIONS)
    found = []
    kills = [("student-finetune", 4), ("teacher-filters", 3), ("teacher-filters", 7), ("student-filters", 7)]
    for stage, after in [*kills, ("distill", 4)]:
        pair = toy_pair("bert")
        collator = Deadly(pair.task, stage, after)
        with pytest.raises(Killed):
            run_ted(pair, cut, collator, before=collator.arm, **OPTIONS)
        found.append([path.name for path in (cut / "checkpoints" / stage).glob("checkpoint-*")])
    assert found == [["checkpoint-2"], [], ["checkpoint-2"], ["checkpoint-2"], ["checkpoint-2"]], "killed in the middle"
    pair = toy_pair("bert")
    assert run_ted(pair, cut, **OPTIONS) == stages
    for name, expected in whole.student.state_dict().items():
        assert torch.equal(pair.student.state_dict()[name], expected), name


def test_the_student_keeps_only_its_own_tensors(tmp_path: Path) -> None:
    pair = toy_pair("gpt2")
    keys = set(pair.student.state_dict())
    run_ted(pair, tmp_path, finetune_student_first=False, training={"max_steps": 1})
    assert set(pair.student.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in pair.student.parameters())


def test_an_encoder_decoder_has_filters_in_both_stacks() -> None:
    teacher = tiny_model("bart", "sequence-classification", seed=1)
    pair = replace(
        toy_pair("bert"),
        teacher=teacher,
        student=ld.make_student(teacher, num_blocks=2),
        teacher_depth={"encoder": 4, "decoder": 4},
        student_depth={"encoder": 2, "decoder": 2},
        teacher_width={"encoder": 32, "decoder": 32},
        student_width={"encoder": 32, "decoder": 32},
    )
    stage = stage_of("teacher-filters", pair, finetune_student_first=False)
    term = stage.terms[0]
    assert [str(layer) for layer in term.layers] == ["encoder.2", "encoder.4", "decoder.2", "decoder.4"]
    batch = next(ToyContext(pair.task).training_batches())
    ends = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(4), ends] = 2
    found = LiveTeacher(teacher).signal(batch, term.needs(START))
    means = term(Signal(None, {}, {}), found, batch, START)
    for layer, place in (("encoder.4", torch.zeros_like(ends)), ("decoder.4", ends)):
        ref = LayerRef.parse(layer)
        moved = {**found.hidden, ref: found.hidden[ref].clone()}
        moved[ref][torch.arange(4), place] += 1
        changed = term(Signal(None, {}, {}), replace(found, hidden=moved), batch, START)
        assert changed[f"filters/{layer}"].value != means[f"filters/{layer}"].value
        elsewhere = {**found.hidden, ref: found.hidden[ref].clone() + 1}
        elsewhere[ref][torch.arange(4), place] -= 1
        same = term(Signal(None, {}, {}), replace(found, hidden=elsewhere), batch, START)
        assert same[f"filters/{layer}"].value.item() == pytest.approx(means[f"filters/{layer}"].value.item(), rel=1e-5)


def test_a_model_that_cannot_be_read_out_is_refused_before_its_filters_train() -> None:
    pair = toy_pair("gpt2", "causal-lm")
    pair.teacher.transformer.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=2 * output.last_hidden_state)
    )
    with pytest.raises(UserError, match="another way than by its final norm"):
        stages_of(pair, finetune_student_first=False)
