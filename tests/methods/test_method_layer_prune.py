"""What is special to layer_prune: rounds, what trains in a repair and against what, resuming, and reference sizes."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_model
from torch import nn
from torch.nn import functional
from toy import ToyCollator, toy_dataset, toy_rows
from toy_recipe import toy_tokenizer
from transformers import PreTrainedModel, TrainingArguments

import layerdistill as ld
from layerdistill.api import make_pair
from layerdistill.context import LiveContext
from layerdistill.core.errors import UserError
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.core.types import Pair
from layerdistill.data import CalibrationConfig, set_aside
from layerdistill.methods.layer_prune import METHOD, LayerPruneConfig
from layerdistill.methods.prune_ranking import candidates, rounds
from layerdistill.methods.table import METHODS
from layerdistill.models import empty_model, find_stacks
from layerdistill.train.trainer import StageTrainer

CALIBRATION = CalibrationConfig(examples=12)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "layer_prune", METHOD)


@functools.cache
def planted_teacher(redundant: int, blocks: int = 5) -> PreTrainedModel:
    """A causal language model that has learned the toy task, one of whose blocks adds nothing."""
    model = tiny_model("llama", "causal-lm", num_layers=blocks, seed=3)
    block: Any = find_stacks(model)[""].blocks[redundant]
    for matrix in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
        nn.init.zeros_(matrix.requires_grad_(False))
    batch = ToyCollator("causal-lm")(toy_rows("causal-lm", size=64, seed=9))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.requires_grad_(True)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    given = {
        "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True, "save_steps": 2,
        "logging_steps": 2, "disable_tqdm": True, "seed": 11, "lr_scheduler_type": "constant", "report_to": [],
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**given, **changes})


def prune(teacher: PreTrainedModel, folder: Path, task: str = "causal-lm", **options: Any) -> ld.DistillResult:
    config = LayerPruneConfig(**{"calibration": CALIBRATION, "num_removed": 2, **options})
    train, validation = toy_dataset(task, size=48, seed=1), toy_dataset(task, size=16, seed=2)
    return ld.distill(
        teacher, None, train, validation, method=config, processing_class=toy_tokenizer(), args=arguments(folder)
    )


def decisions(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "decisions.json").read_text())


# Rounds


def test_numbers_of_rounds_and_candidates() -> None:
    twelve = rounds(12, 1, iterative=True)
    assert twelve == [1] * 12
    assert candidates("one_out_loss", 36, twelve) == 366, "36 -> 24, one by one (notes to the paper: sum of 25..36)"
    assert candidates("task_metric", 36, rounds(8, 1, iterative=True)) == sum(range(29, 37))
    assert candidates("one_out_kl", 36, rounds(12, 1, iterative=False)) == 36
    assert candidates("block_influence", 36, twelve) == 0
    assert rounds(5, 2, iterative=True) == [2, 2, 1]
    assert candidates("one_out_loss", 10, [2, 2, 1]) == 10 + 8 + 6
    assert rounds(5, 1, iterative=False) == [5]


@pytest.mark.parametrize("redundant", [1, 3])
@pytest.mark.parametrize("criterion", ["one_out_loss", "one_out_kl", "block_influence", "angular_distance"])
def test_the_planted_redundant_block_goes_first_and_the_teacher_keeps_its_weights(
    criterion: str, redundant: int, tmp_path: Path
) -> None:
    teacher = planted_teacher(redundant)
    before = fingerprint_model(teacher)
    result = prune(teacher, tmp_path, importance=criterion, repair={"scope": "none"})
    found = decisions(tmp_path)
    assert found["round-1"]["removed_original"] == [redundant]
    assert found["round-1"]["scores"][redundant] == pytest.approx(0, abs=1e-6)
    assert len(found["round-1"]["scores"]) == 5
    assert len(found["round-2"]["scores"]) == 4
    assert found["round-2"]["kept_original"] == result.student.config.original_layer_ids
    second, current = found["round-2"]["removed_original"][0], found["round-2"]["removed"][0]
    assert found["round-1"]["kept_original"][current] == second
    assert fingerprint_model(teacher) == before
    assert not list(tmp_path.glob("checkpoints/*")), "no stage without repair"
    assert found["round-2-evaluation"] == pytest.approx(result.metrics)
    kept = result.student.config.original_layer_ids
    expected = ld.make_student(teacher, copy_map=kept)
    inputs = {"input_ids": torch.tensor([[1, 5, 9, 13]])}
    with torch.no_grad():
        torch.testing.assert_close(result.student(**inputs).logits, expected(**inputs).logits)


def test_ranking_once_and_ranking_anew(tmp_path: Path) -> None:
    teacher = tiny_model("gpt2", "sequence-classification", num_layers=4, seed=3)
    found = {}
    for name, iterative in (("once", False), ("anew", True)):
        folder = tmp_path / name
        prune(
            teacher, folder, "sequence-classification", importance="one_out_kl", iterative=iterative,
            repair={"scope": "none"},
        )  # fmt: skip
        found[name] = decisions(folder)
    assert set(found["once"]) == {"round-1", "round-1-evaluation"}
    assert len(found["once"]["round-1"]["removed"]) == 2
    scores = found["once"]["round-1"]["scores"]
    assert found["once"]["round-1"]["removed"] == sorted(sorted(range(4), key=lambda block: scores[block])[:2])
    assert set(found["anew"]) == {f"round-{n}{tail}" for n in (1, 2) for tail in ("", "-evaluation")}
    assert found["anew"]["round-1"]["scores"] == scores
    lowest = scores.index(min(scores))
    assert found["anew"]["round-1"]["removed"] == [lowest]
    assert found["anew"]["round-2"]["scores"] != [score for block, score in enumerate(scores) if block != lowest]


def test_task_metric_ranks_by_the_first_metric(tmp_path: Path) -> None:
    teacher = tiny_model("bert", "sequence-classification", num_layers=3, seed=3)
    prune(
        teacher, tmp_path, "sequence-classification", importance="task_metric", num_removed=1, repair={"scope": "none"}
    )
    scores = decisions(tmp_path)["round-1"]["scores"]
    rows = toy_dataset("sequence-classification", size=48, seed=1)
    batch = ToyCollator("sequence-classification")(list(set_aside({"train": rows}, CALIBRATION, 11)["calibration"]))

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            chosen = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        return float((chosen == batch["labels"]).double().mean())

    expected = [
        accuracy(teacher) - accuracy(ld.make_student(teacher, copy_map=[b for b in range(3) if b != block]))
        for block in range(3)
    ]
    assert scores == pytest.approx(expected)


# Repair


@pytest.mark.parametrize("planted", [False, True])
def test_only_the_neighbours_move(planted: bool, tmp_path: Path) -> None:
    teacher = copy.deepcopy(planted_teacher(2))
    if not planted:
        nn.init.normal_(teacher.model.layers[2].mlp.down_proj.weight, std=0.02)
    before = fingerprint_model(teacher)
    result = prune(teacher, tmp_path, num_removed=1, importance="block_influence")
    assert result.student.config.original_layer_ids == [0, 1, 3, 4]
    theirs = dict(teacher.named_parameters())
    moved = set()
    for name, parameter in result.student.named_parameters():
        words = name.split(".")
        number = int(words[2]) if words[1] == "layers" else None
        origin = name if number is None else name.replace(f"layers.{number}.", f"layers.{[0, 1, 3, 4][number]}.", 1)
        if not torch.equal(parameter, theirs[origin]):
            moved.add(number)
        assert parameter.requires_grad
    assert moved == (set() if planted else {1, 2}), "and where nothing is missing, there is nothing to learn"
    assert fingerprint_model(teacher) == before
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "repair-1" / "finished")
    assert again.config.original_layer_ids == [0, 1, 3, 4]


def test_repair_brings_a_damaged_student_nearer_to_the_teacher(tmp_path: Path) -> None:
    teacher = tiny_model("llama", "causal-lm", num_layers=4, seed=3)
    batch = ToyCollator("causal-lm")(toy_rows("causal-lm", size=16, seed=2))

    def kl(model: nn.Module) -> float:
        with torch.no_grad():
            ours, wanted = (m(input_ids=batch["input_ids"]).logits.log_softmax(-1) for m in (model, teacher))
        return float(
            functional.kl_div(ours, wanted, log_target=True, reduction="none").sum(-1)[batch["labels"] > 0].mean()
        )

    changes = {"num_removed": 1, "importance": "one_out_kl"}
    pruned = prune(teacher, tmp_path / "none", **changes, repair={"scope": "none"}).student
    repaired = prune(teacher, tmp_path / "neighbours", **changes).student
    assert kl(repaired) < 0.9 * kl(pruned)


def test_scope_all_trains_everything(tmp_path: Path) -> None:
    teacher = tiny_model("llama", "causal-lm", num_layers=3, seed=3)
    student = prune(teacher, tmp_path, num_removed=1, repair={"scope": "all"}).student
    start = ld.make_student(teacher, copy_map=student.config.original_layer_ids)
    same = [
        name for name, value in student.named_parameters() if torch.equal(value, dict(start.named_parameters())[name])
    ]
    assert same == []


# Going on after a kill


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "layer_prune", METHOD)
        prune(tiny_model("llama", "causal-lm", num_layers=4, seed=3), folder).student.save_pretrained(
            folder / "student"
        )
    return folder


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(LiveContext, "calibration", 2), (StageTrainer, "training_step", 3), (LiveContext, "evaluate", 1),
     (StageTrainer, "training_step", 8), (LiveContext, "evaluate", 2)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_killed_and_resumed_is_uninterrupted(
    owner: type, name: str, call: int, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_model("llama", "causal-lm", num_layers=4, seed=3)
    own, calls = getattr(owner, name), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)
    with pytest.raises(Killed):
        prune(teacher, tmp_path)
    monkeypatch.setattr(owner, name, own)
    prune(teacher, tmp_path).student.save_pretrained(tmp_path / "student")
    assert decisions(tmp_path) == decisions(uninterrupted)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "student" / file).read_bytes() == (uninterrupted / "student" / file).read_bytes()


# Recipes


def test_calibration_rows_of_the_reported_split_are_refused(tmp_path: Path) -> None:
    teacher = tiny_model("llama", "causal-lm", num_layers=3)
    with pytest.raises(UserError, match="what is chosen on it cannot be judged on it"):
        prune(teacher, tmp_path, calibration=CalibrationConfig(split="validation"))
    rows = toy_dataset("causal-lm", size=48, seed=1)
    config = LayerPruneConfig(num_removed=1, calibration=CALIBRATION)
    with pytest.raises(UserError, match=r"also stand in data\.validation"):
        ld.distill(
            teacher, None, rows, rows, method=config, processing_class=toy_tokenizer(), args=arguments(tmp_path / "b")
        )


PROBLEMS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "causal-lm", "neither of num_removed and num_blocks"),
    ({"num_removed": 2, "num_blocks": 2}, "causal-lm", "both of num_removed and num_blocks"),
    ({"num_removed": 4}, "causal-lm", "num_removed is 4, but the teacher has 4 blocks: give 1 to 3"),
    ({"num_blocks": 4}, "causal-lm", "num_blocks is 4, but the teacher has 4 blocks: give 1 to 3"),
    ({"num_removed": 2, "per_round": 3}, "causal-lm", "per_round is 3, but only 2 blocks go"),
    ({"num_removed": 2, "per_round": 2, "iterative": False}, "causal-lm", "per_round belongs to iterative"),
    ({"num_removed": 1, "importance": "task_metric"}, "causal-lm", "Write importance: one_out_loss"),
    ({"num_removed": 1, "loss": "paper", "temperature": 2.0}, "causal-lm", "loss: paper has 1"),
    ({"num_removed": 1, "loss": "paper"}, "regression", "does not fit regression"),
    ({"num_removed": 1, "count_padding": True}, "causal-lm", "belongs to loss: paper"),
    ({"num_removed": 1, "weights": {"logits": 0, "hidden": 0}}, "causal-lm", "nothing to learn"),
    ({"num_removed": 1, "repair": {"scope": "all", "radius": 2}}, "causal-lm", "belongs to scope: neighbours"),
]


@pytest.mark.parametrize(("options", "task", "message"), PROBLEMS)
def test_problems_are_found_without_models(options: dict[str, Any], task: str, message: str) -> None:
    pair = Pair(None, nn.Identity(), task, {"": 4}, {"": 4}, {"": 32}, {"": 32}, None, 0)
    (problem,) = METHOD.problems(LayerPruneConfig(**options), pair)
    assert message in problem


def test_a_teacher_that_nothing_can_be_removed_from() -> None:
    for depths, message in (({"": 1}, "only one"), ({"encoder": 4, "decoder": 4}, "an encoder and a decoder")):
        pair = Pair(None, nn.Identity(), "causal-lm", depths, depths, depths, depths, None, 0)
        assert message in METHOD.problems(LayerPruneConfig(num_removed=1), pair)[0]


QWEN = transformers.Qwen2Config(
    hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip


def test_the_depth_ladder_of_qwen_3b() -> None:
    teacher, student = (empty_model(QWEN, "causal-lm") for _ in range(2))
    assert sum(parameter.numel() for parameter in teacher.parameters()) == 3_085_938_688
    pair = Pair(teacher, student, "causal-lm", {"": 36}, {"": 36}, {"": 2048}, {"": 2048}, 151936, 0)
    previews = METHOD.preview(pair, LayerPruneConfig(num_blocks=24, loss="paper"))
    left = [3_085_938_688, *(preview.student_parameters for preview in previews)]
    assert [preview.name for preview in previews] == [f"repair-{number}" for number in range(1, 13)]
    assert left[2] == 2_931_784_704
    assert [round(left[removed] / 1e9, 3) for removed in (8, 12)] == [2.469, 2.161]
    assert {round((a - b) / 1e6, 2) for a, b in itertools.pairwise(left)} == {77.08}
    assert previews[0].terms == ["1 × logits", "1 × hidden per pair"]
    (alone,) = METHOD.preview(pair, LayerPruneConfig(num_blocks=28, iterative=False, repair={"scope": "none"}))
    assert (alone.terms, alone.student_parameters) == (["no training"], left[8])


def test_blocks_that_cannot_go_are_refused_before_anything_is_ranked() -> None:
    pair = make_pair(*(tiny_model("gpt2", "causal-lm") for _ in range(2)), seed=1)
    assert METHOD.problems(LayerPruneConfig(num_removed=1), pair) == []
    pair.student.config.scale_attn_by_inverse_layer_idx = True
    (problem,) = METHOD.problems(LayerPruneConfig(num_removed=1), pair)
    assert "scale_attn_by_inverse_layer_idx" in problem
    assert METHOD.problems(LayerPruneConfig(num_removed=1, importance="block_influence"), pair) == []
    pair.student.config.layerdistill = {"replaced": [1]}
    (problem,) = METHOD.problems(LayerPruneConfig(num_removed=1), pair)
    assert "compact blocks in the places [1]" in problem
    albert = transformers.AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, num_hidden_layers=4, num_attention_heads=4
    )
    shared = empty_model(albert, "sequence-classification")
    depth, width = {"": 4}, {"": 32}
    without = Pair(shared, shared, "sequence-classification", depth, depth, width, width, None, 0)
    (problem,) = METHOD.problems(LayerPruneConfig(num_removed=1), without)
    assert "blocks of AlbertForSequenceClassification cannot be told" in problem
