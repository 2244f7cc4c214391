"""Structured L1 pruning: how much of what goes, and what becomes of the student."""

from __future__ import annotations

import copy
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from term_references import pair_of
from tiny_models import tiny_batch, tiny_model
from toy import ToyCollator, toy_dataset
from transformers import GPT2Config, PreTrainedModel

from layerdistill.context import LiveContext
from layerdistill.core.errors import UserError
from layerdistill.core.files import read_json
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.core.types import Pair
from layerdistill.methods.l1_prune import METHOD, L1PruneConfig, find_removal
from layerdistill.models import count_parameters, empty_model, load_student, shrink_config
from layerdistill.models.narrow import Units, count_units
from layerdistill.signals import LiveTeacher
from layerdistill.train.stage import StageInput, run_stage
from layerdistill.train.trainer import save_student

GPT2 = 124_439_808
ISKD = 86_264_832
"""GPT-2 after ISKD has replaced 6 of its 12 blocks."""


def units_of_gpt2() -> Units:
    return count_units(empty_model(GPT2Config(), "causal-lm"))


def grown(family: str = "gpt2", seed: int = 1) -> Pair:
    """A teacher and a copy of it."""
    task = "causal-lm" if family in ("gpt2", "qwen3", "llama") else "sequence-classification"
    teacher = tiny_model(family, task, num_layers=3, num_heads=8, seed=seed)
    sizes = {"": 3}, {"": 3}, {"": 32}, {"": 32}
    return Pair(teacher, copy.deepcopy(teacher), task, *sizes, 64 if task == "causal-lm" else None, 0)


def stage_input(pair: Pair, folder: Path, steps: int = 30) -> StageInput:
    training = {
        "max_steps": steps, "per_device_train_batch_size": 16, "learning_rate": 5e-3, "logging_steps": 10,
        "lr_scheduler_type": "constant", "use_cpu": True,
    }  # fmt: skip
    datasets = {"train": toy_dataset(pair.task, size=48, seed=3)}
    quiet = Console(quiet=True)
    return StageInput(pair.task, datasets, ToyCollator(pair.task), None, training, 11, folder, quiet)


def prune(pair: Pair, folder: Path, **options: Any) -> list[str]:
    """Run the method to its end; the names of the stages."""
    given = stage_input(pair, folder)
    stages = []
    for stage in METHOD.stages(pair, L1PruneConfig(**options), LiveContext(given, ["perplexity"])):
        run_stage(stage, given, LiveTeacher(pair.teacher))  # type: ignore[arg-type]
        stages.append(stage.name)
    return stages


def same_logits(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    batch = tiny_batch(one)
    with torch.no_grad():
        return torch.equal(one.eval()(**batch).logits, other.eval()(**batch).logits)


# How much


def test_gpt2_at_the_size_of_iskd() -> None:
    units = units_of_gpt2()
    removal = find_removal(units, L1PruneConfig(parameters=ISKD))
    assert (removal.heads, removal.neurons) == (5, 1430)
    assert removal.parameters == GPT2 - 12 * (5 * 196_800 + 1430 * 1537) == units.parameters_without(5, 1430)
    assert abs(removal.parameters - ISKD) <= units.parameters_per_neuron / 2, "the nearest number of neurons"
    shares = Fraction(5, 12), Fraction(1430, 3072)
    for heads in range(12):
        neurons = round((GPT2 - ISKD - heads * units.parameters_per_head) / units.parameters_per_neuron)
        if 0 <= neurons < 3072:
            assert abs(Fraction(heads, 12) - Fraction(neurons, 3072)) >= abs(shares[0] - shares[1])
    assert find_removal(units, L1PruneConfig(removed=1 - ISKD / GPT2)) == removal
    meta = count_parameters(pruned_on_meta(ISKD))["total"]
    assert meta == removal.parameters
    assert round(100 * (1 - meta / GPT2), 2) == 30.68


def pruned_on_meta(parameters: int) -> PreTrainedModel:
    pair = meta_pair()
    for _ in METHOD.stages(pair, L1PruneConfig(parameters=parameters), FirstUnits()):  # type: ignore[arg-type]
        break
    return pair.student  # type: ignore[return-value]


class FirstUnits:
    """A context in which, for want of numbers, the first heads and neurons are chosen."""

    def decide(self, name: str, choose: Any) -> dict[str, list[list[int]]]:
        return {"heads": [list(range(5))] * 12, "neurons": [list(range(1430))] * 12}

    def say(self, sentence: str) -> None:
        assert "5 of 12 heads and 1,430 of 3,072" in sentence


def meta_pair() -> Pair:
    teacher = empty_model(GPT2Config(), "causal-lm")
    sizes = {"": 12}, {"": 12}, {"": 768}, {"": 768}
    return Pair(teacher, empty_model(GPT2Config(), "causal-lm"), "causal-lm", *sizes, 50_257, 0)


@pytest.mark.parametrize("removed", [0.05, 0.2, 0.3068, 0.45])
@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama"])
def test_the_target_is_met_within_a_hundredth(family: str, removed: float) -> None:
    pair = grown(family)
    whole = count_parameters(pair.student)["total"]
    removal = find_removal(count_units(pair.student), L1PruneConfig(removed=removed))
    list(METHOD.stages(pair, L1PruneConfig(removed=removed, recovery=False), Remembers()))  # type: ignore[arg-type]
    left = count_parameters(pair.student)["total"]
    assert left == removal.parameters
    assert abs(left - (1 - removed) * whole) <= 0.01 * (1 - removed) * whole


class Remembers:
    """A context that chooses, and notes what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.decisions: dict[str, Any] = {}

    def decide(self, name: str, choose: Any) -> Any:
        self.decisions[name] = choose()
        return self.decisions[name]

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


@pytest.mark.parametrize(("kind", "other"), [("heads", "neurons"), ("neurons", "heads")])
def test_only_one_kind(kind: str, other: str) -> None:
    units = units_of_gpt2()
    parameters = units.parameters_without(6, 0) if kind == "heads" else units.parameters_without(0, 1000)
    removal = find_removal(units, L1PruneConfig(parameters=parameters, **{other: False}))  # type: ignore[arg-type]
    assert (removal.heads, removal.neurons) == ((6, 0) if kind == "heads" else (0, 1000))


def test_what_cannot_be_reached_is_refused() -> None:
    units = units_of_gpt2()
    for wrong in ({"parameters": 30_000_000}, {"parameters": 2 * GPT2}, {"removed": 0.00001}):
        with pytest.raises(UserError, match="cannot be reached within 1%") as caught:
            find_removal(units, L1PruneConfig(**wrong))
        assert "124,439,808" in str(caught.value)
        problems = METHOD.problems(L1PruneConfig(**wrong), meta_pair())
        assert problems == list(caught.value.problems)
    with pytest.raises(UserError, match="nearest that can be reached is 98,462"):
        find_removal(units, L1PruneConfig(parameters=60_000_000, neurons=False))
    coarse = Units(2, 4, 8, 1, 1000, 10, 10_000)
    with pytest.raises(UserError, match="by removing heads:"):
        find_removal(coarse, L1PruneConfig(parameters=8_500, neurons=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give method.parameters"),
        ({"parameters": 1000, "removed": 0.2}, "and not both"),
        ({"removed": 0.2, "heads": False, "neurons": False}, "leave one of them true"),
        ({"removed": 1.0}, "less than 1"),
        ({"removed": 0}, "greater than 0"),
    ],
)
def test_options_that_say_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        L1PruneConfig(**options)


def test_problems_without_models() -> None:
    assert METHOD.problems(L1PruneConfig(removed=0.3), pair_of()) == []
    silent = L1PruneConfig(removed=0.3, weights={"task": 0, "logits": 0})  # type: ignore[arg-type]
    assert "Write recovery: false" in METHOD.problems(silent, pair_of())[0]
    wrong = METHOD.problems(L1PruneConfig(removed=0.3, logits_loss="forward_kl"), pair_of("regression"))
    assert "does not fit the task" in wrong[0]
    assert (
        METHOD.problems(L1PruneConfig(removed=0.3, logits_loss="forward_kl", recovery=False), pair_of("regression"))
        == []
    )


# What is done


def test_the_lowest_go_and_the_rest_stays(tmp_path: Path) -> None:
    pair, context = grown("bert"), Remembers()
    with torch.no_grad():
        for block in pair.student.bert.encoder.layer:  # type: ignore[union-attr]
            for name in ("query", "key", "value"):
                getattr(block.attention.self, name).weight[8:12] = 0
            block.intermediate.dense.weight[56:] = 0
            block.output.dense.weight[:, 56:] = 0
    units = count_units(pair.student)
    config = L1PruneConfig(parameters=units.parameters_without(1, 8), recovery=False)
    assert list(METHOD.stages(pair, config, context)) == []  # type: ignore[arg-type]
    assert context.decisions["l1_prune"] == {"heads": [[2]] * 3, "neurons": [list(range(56, 64))] * 3}
    assert context.said == [
        "Every block loses 1 of 8 heads and 8 of 64 feed-forward neurons. The student is saved with a "
        "modelling file, because its configuration cannot say how many heads are left."
    ]
    save_student(pair.student, tmp_path)
    assert same_logits(load_student(tmp_path), pair.student)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bert"])
def test_recovery_lowers_the_loss_and_the_student_reopens(family: str, tmp_path: Path) -> None:
    pair = grown(family)
    before = fingerprint_model(pair.teacher)  # type: ignore[arg-type]
    whole = count_parameters(pair.student)["total"]
    assert prune(pair, tmp_path, removed=0.25) == ["recover"]
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"distill/task", "distill/logits"} <= set(lines[0])
    assert fingerprint_model(pair.teacher) == before, "the teacher keeps its weights"  # type: ignore[arg-type]
    assert count_parameters(pair.student)["total"] < 0.76 * whole
    save_student(pair.student, tmp_path / "student")
    again = load_student(tmp_path / "student")
    assert same_logits(again, pair.student)  # type: ignore[arg-type]
    assert (tmp_path / "student" / "modeling_layerdistill.py").exists() == (family != "qwen3")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_without_recovery_there_is_no_stage(tmp_path: Path) -> None:
    pair = grown()
    start = {name: value.clone() for name, value in pair.student.state_dict().items()}
    assert prune(pair, tmp_path, removed=0.25, recovery=False) == []
    left = dict(pair.student.named_parameters())
    assert torch.equal(left["transformer.wte.weight"], start["transformer.wte.weight"])
    assert torch.equal(left["transformer.h.0.mlp.c_proj.bias"], start["transformer.h.0.mlp.c_proj.bias"])
    assert not (tmp_path / "checkpoints").exists()


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole = grown()
    prune(whole, tmp_path / "whole", removed=0.25)
    once = grown()
    given = stage_input(once, tmp_path / "twice")
    stages = METHOD.stages(once, L1PruneConfig(removed=0.25), LiveContext(given, ["perplexity"]))
    stage = next(stages)
    stage.training |= {"max_steps": 10, "save_steps": 10, "save_total_limit": 2}
    run_stage(stage, given, LiveTeacher(once.teacher))  # type: ignore[arg-type]
    finished = tmp_path / "twice" / "checkpoints" / "recover" / "finished"
    finished.rename(finished.with_name("gone"))
    state = finished.with_name("checkpoint-10") / "trainer_state.json"
    state.write_text(state.read_text().replace('"max_steps": 10', '"max_steps": 30'))
    decisions = read_json(tmp_path / "twice" / "decisions.json")
    again = grown()
    prune(again, tmp_path / "twice", removed=0.25)
    assert read_json(tmp_path / "twice" / "decisions.json") == decisions
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name]), name
    loaded = grown()
    prune(loaded, tmp_path / "twice", removed=0.25)
    assert fingerprint_model(loaded.student) == fingerprint_model(again.student), "a finished stage is only loaded"


# What is said beforehand


def test_plan_says_what_is_left() -> None:
    pair = meta_pair()
    removal = find_removal(units_of_gpt2(), L1PruneConfig(parameters=ISKD))
    (shown,) = METHOD.preview(pair, L1PruneConfig(parameters=ISKD))
    assert (shown.name, shown.student_parameters, shown.thrown_away) == ("recover", removal.parameters, 0)
    assert list(shown.terms) == ["0.5 × task", "0.5 × logits"]
    assert "5 of 12 heads and 1,430 of 3,072 feed-forward neurons" in shown.notes[0]
    assert "modelling file" in shown.notes[0]
    assert count_parameters(pair.student)["total"] == GPT2, "the pair is left as it is"
    (shown,) = METHOD.preview(pair, L1PruneConfig(parameters=ISKD, recovery=False, heads=False))
    assert (shown.name, list(shown.terms)) == ("prune", ["no training"])
    assert "an ordinary checkpoint" in shown.notes[0]


@pytest.mark.parametrize(("blocks", "parameters", "removed"), [(6, 81_912_576, 34.17), (7, 89_000_448, 28.48)])
def test_the_sizes_of_the_layer_subsets_that_iskd_is_compared_with(
    blocks: int, parameters: int, removed: float
) -> None:
    config = shrink_config(GPT2Config(), num_blocks=blocks, copy_map="skip")
    counted = count_parameters(empty_model(config, "causal-lm"))["total"]
    assert counted == parameters
    assert round(100 * (1 - counted / GPT2), 2) == removed
