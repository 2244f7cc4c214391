"""TED's first stage: the losses by which filters are learned, and that the model under them does not move."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ted_cases import ToyContext, block_outputs, linear, run_ted, stage_of, stages_of, toy_pair
from torch import Tensor, nn
from torch.nn import functional

from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.core.types import Progress, Signal
from layerdistill.matching.filters import Filters
from layerdistill.methods.phase import frozen
from layerdistill.signals import LiveTeacher
from layerdistill.signals.recorded import RecordedTeacher

START = Progress()
NOTHING = Signal(None, {}, {})


def means_of(stage: Any, batch: Any) -> dict[str, Any]:
    """The stage's means on a batch, as the trainer would get them."""
    term = stage.terms[0]
    return term(NOTHING, stage.teacher.signal(batch, term.needs(START)), batch, START)


def stir(stage: Any) -> None:
    """Make filters and heads anything but their start."""
    with torch.no_grad():
        for number, parameter in enumerate(stage.terms.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.3 * noise)


@pytest.mark.parametrize("task", ["sequence-classification", "regression", "multi-label-classification"])
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_the_loss_of_a_classifiers_filters_against_the_formula(whose: str, family: str, task: str) -> None:
    pair = toy_pair(family, task)
    context = ToyContext(task)
    stage = stage_of(f"{whose}-filters", pair, context)
    assert (stage.student, isinstance(stage.teacher, RecordedTeacher)) == (None, True)
    stir(stage)
    batch = list(context.training_batches())[1]
    found = means_of(stage, batch)
    layers = (2, 4) if whose == "teacher" else (1, 2)
    assert set(found) == {f"filters/{layer}" for layer in layers}
    outputs = block_outputs(copy.deepcopy(pair.teacher if whose == "teacher" else pair.student), batch)
    term = stage.terms[0]
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    for layer in layers:
        head, filters = term.heads[str(layer)], term.filters["only"].maps[str(layer)]
        total = 0.0
        for row, length in enumerate(lengths):
            token = outputs[layer - 1][row, 0 if family == "bert" else length - 1]
            pooled = linear(head[1], linear(filters, token))
            pooled = pooled * (1 + torch.special.erf(pooled / math.sqrt(2))) / 2
            total += task_reference(task, linear(head[4], pooled), batch["labels"][row])
        mean = found[f"filters/{layer}"]
        assert mean.count.item() == len(lengths)
        assert mean.value.item() == pytest.approx(total / len(lengths), rel=1e-4)
        assert (term.unit(f"filters/{layer}"), term.coefficient(f"filters/{layer}", START)) == ("example", 0.5)


def task_reference(task: str, output: Tensor, label: Tensor) -> float:
    if task == "regression":
        return float((output[0] - label) ** 2)
    if task == "sequence-classification":
        return float(torch.log(torch.exp(output).sum()) - output[label])
    chances = 1 / (1 + torch.exp(-output))
    return float(-(label * torch.log(chances) + (1 - label) * torch.log(1 - chances)).mean())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("nonlinear", [False, True])
def test_the_loss_of_a_language_models_filters_against_the_formula(family: str, nonlinear: bool) -> None:
    pair = toy_pair(family, "causal-lm")
    context = ToyContext("causal-lm")
    stage = stage_of("teacher-filters", pair, context, nonlinear=nonlinear)
    stir(stage)
    batch = list(context.training_batches())[1]
    means = means_of(stage, batch)
    model: Any = copy.deepcopy(pair.teacher)
    outputs = block_outputs(model, batch)
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    loss = torch.zeros((), dtype=torch.float64)
    filters = copy.deepcopy(stage.terms[0].filters["only"]).double()
    for layer in (2, 4):
        losses = []
        for row, place in (batch["labels"][:, 1:] != -100).nonzero().tolist():
            logits = model.lm_head(norm(filters.maps[str(layer)](outputs[layer - 1][row, place])))
            losses.append(torch.log(torch.exp(logits).sum()) - logits[batch["labels"][row, place + 1]])
        mean = means[f"filters/{layer}"]
        assert mean.count.item() == len(losses)
        assert mean.value.item() == pytest.approx(sum(losses).item() / len(losses), rel=1e-4)
        loss = loss + sum(losses)
    assert stage.terms[0].unit("filters/2") == "label"
    sum(mean.total for mean in means.values()).backward()
    loss.backward()
    reached = {name: parameter.grad for name, parameter in stage.terms[0].filters["only"].named_parameters()}
    for name, parameter in filters.named_parameters():
        torch.testing.assert_close(reached[name].double(), parameter.grad, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in pair.teacher.parameters()), "the head is frozen"


def test_filters_of_a_language_model_start_where_the_last_layer_is_read_as_the_model_reads_it() -> None:
    pair = toy_pair("gpt2", "causal-lm")
    context = ToyContext("causal-lm")
    stage = stage_of("teacher-filters", pair, context)
    batch = next(context.training_batches())
    own = pair.teacher(**batch).loss.item()
    assert means_of(stage, batch)["filters/4"].value.item() == pytest.approx(own, rel=1e-5)


def test_dropout_as_in_the_released_code() -> None:
    pair = toy_pair("bert")
    pair.teacher.config.hidden_dropout_prob = 0.1
    for module in pair.teacher.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    context = ToyContext(pair.task)
    stage = stage_of("teacher-filters", pair, context, stage_one={"dropout": True})
    assert isinstance(stage.teacher, LiveTeacher)
    assert pair.teacher.training
    assert [module.p for module in stage.terms[0].heads["2"] if isinstance(module, nn.Dropout)] == [0.0, 0.1]
    batch = next(context.training_batches())
    first, second = (means_of(stage, batch)["filters/2"].value.item() for _ in range(2))
    assert first != second
    still = stage_of("teacher-filters", toy_pair("bert"), context)
    assert [module.p for module in still.terms[0].heads["2"] if isinstance(module, nn.Dropout)] == [0.0, 0.0]


def test_after_its_phase_a_model_trains_again_and_is_in_eval_mode() -> None:
    pair = toy_pair("bert")
    frozen_weight = pair.student.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    context = ToyContext(pair.task)
    stages_of(pair, context, stage_one={"dropout": True})
    trains = [parameter.requires_grad for parameter in pair.student.parameters()]
    assert sum(trains) == len(trains) - 1
    assert not frozen_weight.requires_grad
    assert not pair.teacher.training
    assert not pair.student.training
    assert [sentence.split(" (")[0] for sentence in context.said] == [
        "No weight of the teacher changed",
        "No weight of the student changed",
    ]


@pytest.mark.parametrize(
    ("options", "epochs", "kind"),
    [
        ({}, 3, RecordedTeacher),
        ({}, 1, LiveTeacher),
        ({"stage_one": {"num_train_epochs": 1.0}}, 3, LiveTeacher),
        ({"stage_one": {"num_train_epochs": 2.0}}, 1, RecordedTeacher),
        ({"stage_one": {"max_steps": 50}}, 1, RecordedTeacher),
        ({"stage_one": {"record_gb": 0}}, 3, LiveTeacher),
        ({"stage_one": {"record_gb": 1e-9}}, 3, LiveTeacher),
    ],
)
def test_the_model_is_recorded_where_that_saves_work_and_fits(options: Any, epochs: int, kind: type) -> None:
    pair = toy_pair("bert")
    context = ToyContext(pair.task, epochs)
    assert type(stage_of("teacher-filters", pair, context, **options).teacher) is kind
    if kind is RecordedTeacher:
        assert context.decisions == {"record-teacher": True}
        context.decisions["record-teacher"] = False
        again = stage_of("teacher-filters", toy_pair("bert"), context, **options)
        assert type(again.teacher) is LiveTeacher, "what was decided before is not decided again"


@pytest.mark.parametrize(
    ("family", "task", "dropout"),
    [("bert", "sequence-classification", False), ("gpt2", "causal-lm", False), ("llama", "causal-lm", True)],
)
def test_no_weight_of_the_model_moves_and_the_filters_learn(
    family: str, task: str, dropout: bool, tmp_path: Path
) -> None:
    pair = toy_pair(family, task)
    before = fingerprint_model(pair.teacher), fingerprint_model(pair.student)
    names = run_ted(
        pair, tmp_path, stage_one={"dropout": dropout}, finetune_student_first=False, training={"max_steps": 2}
    )
    assert names == ["teacher-filters", "student-filters", "distill"]
    assert fingerprint_model(pair.teacher) == before[0]
    assert fingerprint_model(pair.student) != before[1], "the last stage trains it"


def test_a_model_that_moves_in_a_phase_that_freezes_it_is_our_fault() -> None:
    pair = toy_pair("bert")
    weight = pair.student.bert.embeddings.word_embeddings.weight
    with pytest.raises(RuntimeError, match="weights of the student moved"), frozen(pair.student, "student", print):
        weight.data[0, 0] += 1


def test_filters_and_heads_learn_the_task() -> None:
    pair = toy_pair("bert")
    stage = stage_of("teacher-filters", pair)
    batch = next(ToyContext(pair.task).training_batches())
    optimizer = torch.optim.Adam(stage.terms.parameters(), lr=1e-2)
    values = []
    for _ in range(60):
        loss = sum(mean.value for mean in means_of(stage, batch).values()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]
    start = Filters(stage.terms[0].layers, 32, 32, seed=7, whose="teacher")
    moved = functional.mse_loss(stage.terms[0].filters["only"].maps["2"].weight, start.maps["2"].weight)
    assert moved.item() > 1e-5
