"""Whole recipes with student.vocabulary: trimmed; the student opens with plain transformers, as it was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from task_recipes import task_recipe
from toy_recipe import WORDS, toy_recipe, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from layerdistill import finetune, runner
from layerdistill.core.errors import UserError
from layerdistill.core.files import read_json
from layerdistill.core.types import LayerRef, Needs
from layerdistill.diagnosis import diagnose
from layerdistill.measurement import evaluate_folder
from layerdistill.plan import show_plan
from layerdistill.prepare import prepare
from layerdistill.recipe import load_recipe
from layerdistill.runner import run
from layerdistill.signals import LiveTeacher
from layerdistill.train.trainer import StageTrainer

QUIET = Console(quiet=True)
LOST = ("w7", "w11", "w30")
"""Words that the training split has not."""


def trimmed_recipe(folder: Path, task: str, method: str = "kd", **student: Any) -> dict[str, Any]:
    recipe = task_recipe(folder, task, method)
    recipe["student"] = {"num_blocks": 2, "hidden_size": 16, "init": "truncate", "vocabulary": "trimmed", **student}
    recipe["training"] = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    path = Path(recipe["data"]["train"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["text"] = " ".join(word for word in row["text"].split() if word not in LOST) or "w1"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe


@pytest.fixture
def students(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pairs that were trained, as they were in memory."""
    seen: list[Any] = []
    really = runner.train

    def note(prepared: Any, pair: Any, *rest: Any) -> int:
        seen.append(pair)
        return really(prepared, pair, *rest)

    monkeypatch.setattr(runner, "train", note)
    return seen


@pytest.mark.parametrize(
    ("task", "opener"),
    [("sequence-classification", AutoModelForSequenceClassification), ("causal-lm", AutoModelForCausalLM)],
)
def test_the_student_that_was_measured_is_the_one_that_opens(
    task: str, opener: Any, tmp_path: Path, students: list[Any]
) -> None:
    recipe = trimmed_recipe(tmp_path, task)
    result = run(recipe, console=QUIET)
    tokenizer, model = AutoTokenizer.from_pretrained(result.student), opener.from_pretrained(result.student)
    used = {
        word
        for row in Path(recipe["data"]["train"]).read_text().splitlines()
        for word in json.loads(row)["text"].split()
    }
    assert set(tokenizer.get_vocab()) == used | {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    assert len(tokenizer) < len(toy_tokenizer())
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer(["w1 w2 w54", "w3 w7 w9 w12"], padding=True, return_tensors="pt")
    assert batch["input_ids"][1].tolist().count(tokenizer.unk_token_id) == 1, "w7 is gone"
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, students[0].student.cpu().eval()(**inputs).logits)
    found = evaluate_folder(str(result.folder), load_recipe(recipe))
    assert found["model"] == result.metrics
    evaluation = read_json(result.folder / "evaluation.json")
    assert evaluation["cost"]["student"]["parameters"]["embedding"] < 16 * (64 + 130)
    whole = run(
        {**recipe, "student": {**recipe["student"], "vocabulary": "full"}, "output": str(tmp_path / "full")},
        console=QUIET,
    )
    assert whole.teacher_metrics == result.teacher_metrics, "the teacher reads by its own tokenizer"
    assert whole.cost["teacher"]["parameters"] == result.cost["teacher"]["parameters"]


def test_the_teacher_is_asked_about_the_same_tokens(tmp_path: Path) -> None:
    prepared = prepare(load_recipe(trimmed_recipe(tmp_path, "causal-lm")))
    assert prepared.whole is not None
    assert prepared.pair.vocab_size == len(prepared.whole.kept) == prepared.student_config.vocab_size
    loaded = finetune.load_teacher(prepared, lambda where: pytest.fail("nothing is to be trained"), QUIET).model
    asked = finetune.in_students_ids(prepared, loaded)
    rows = range(6)
    ours = prepared.collator([prepared.datasets["train"][row] for row in rows])
    theirs = prepared.whole.collator([prepared.whole.datasets["train"][row] for row in rows])
    needs = Needs(teacher=frozenset({LayerRef("", 0), LayerRef("", 4)}), teacher_logits=True)
    small, large = LiveTeacher(asked).signal(ours, needs), LiveTeacher(loaded).signal(theirs, needs)
    for layer in needs.teacher:
        assert torch.equal(small.hidden[layer], large.hidden[layer])
    torch.testing.assert_close(small.logits, large.logits[..., list(prepared.whole.kept)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_filters_are_learned_on_the_trimmed_teacher(task: str, tmp_path: Path) -> None:
    recipe = trimmed_recipe(tmp_path, task, "ted", init="copy", hidden_size=32)
    recipe["training"] |= {"max_steps": 2}
    recipe["evaluation"] = {"cost": False}
    result = run(recipe, console=QUIET)
    vocabulary = AutoTokenizer.from_pretrained(result.student).get_vocab()
    opener = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    assert opener.from_pretrained(result.student).config.vocab_size == len(vocabulary) < 60


def test_the_fine_tuned_teacher_is_the_one_of_untrimmed_runs(tmp_path: Path) -> None:
    recipe = trimmed_recipe(tmp_path, "sequence-classification")
    recipe["teacher"]["finetune"] = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 5e-3}
    names = []
    for vocabulary in ("full", "trimmed"):
        prepared = prepare(load_recipe(recipe, [f"student.vocabulary={vocabulary}"]))
        assert prepared.recipe.teacher is not None
        names.append(finetune.teacher_fingerprint(prepared, finetune.starting_model(prepared, prepared.recipe.teacher)))
    assert names[0] == names[1]
    trimmed = run({**recipe, "output": str(tmp_path / "first")}, console=QUIET)
    tokenizer = AutoTokenizer.from_pretrained(finetune.kept_teachers() / names[0])
    assert tokenizer.get_vocab() == toy_tokenizer().get_vocab()
    recipe["student"]["vocabulary"] = "full"
    assert run({**recipe, "output": str(tmp_path / "second")}, console=QUIET).teacher_metrics == trimmed.teacher_metrics


def test_other_training_data_do_not_change_how_a_finished_student_reads(tmp_path: Path) -> None:
    recipe = trimmed_recipe(tmp_path, "sequence-classification")
    result = run(recipe, console=QUIET)
    for override in ("data.max_train_examples=3", "student.vocabulary=full"):
        found = evaluate_folder(str(result.folder), load_recipe(recipe, [override]))
        assert found["model"] == result.metrics, override
    folder = diagnose(result.folder, parts="similarity", console=QUIET)
    assert (folder / "diagnose.json").exists()
    with pytest.raises(UserError, match=r"trimmed vocabulary of .* tokens"):
        diagnose(result.folder, ["data.max_train_examples=3"], parts="similarity", console=QUIET)


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = trimmed_recipe(tmp_path, "causal-lm", "ild", num_blocks=1)
    recipe["training"] |= {"max_steps": 6, "save_steps": 2}
    whole = run({**recipe, "output": str(tmp_path / "whole")}, console=QUIET)
    really, steps = StageTrainer.compute_loss, []

    def stop_at_the_fourth(self: StageTrainer, *args: Any, **given: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise MemoryError("the machine went down")
        return really(self, *args, **given)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "compute_loss", stop_at_the_fourth)
        with pytest.raises(MemoryError):
            run(recipe, console=QUIET)
    result = run(recipe, console=QUIET)
    ours, theirs = (load_file(done.student / "model.safetensors") for done in (result, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert result.metrics == whole.metrics


def test_plan_says_what_is_kept(tmp_path: Path) -> None:
    recipe = load_recipe(trimmed_recipe(tmp_path, "sequence-classification"))
    console = Console(width=200, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    prepared = show_plan(recipe, console)
    said = console.export_text()
    assert prepared.whole is not None
    kept = len(prepared.whole.kept)
    assert f"trimmed to {kept} of 60 tokens ({100 * kept / 60:.1f} %)" in said
    assert "validation: 0.0 % more tokens" in said, "words here have no pieces"
    assert f"{kept * 16 + (128 + 2) * 16:,}" in said, "parameters of the student's embeddings"


def test_what_cannot_be_trimmed_is_refused(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path)
    recipe["student"] = {"model": str(tmp_path / "teacher"), "vocabulary": "trimmed"}
    with pytest.raises(UserError, match=r"student\.model .* brings weights for its whole vocabulary"):
        load_recipe(recipe)
    recipe["student"] = {"vocabulary": "trimmed"}
    prepared = prepare(load_recipe(recipe))
    assert prepared.student_config.num_hidden_layers == 4, "nothing but the vocabulary is smaller"
    toy_tokenizer(WORDS[::-1]).save_pretrained(tmp_path / "other")
    recipe["data"]["tokenizer"], recipe["method"] = str(tmp_path / "other"), {"name": "none"}
    with pytest.raises(UserError, match=r"data\.tokenizer is not the teacher's"):
        prepare(load_recipe(recipe))


def test_more_likeliest_tokens_than_are_left_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    recipe = trimmed_recipe(tmp_path, "causal-lm")
    recipe["method"]["logits_top_k"] = len(toy_tokenizer()) - 2
    prepare(load_recipe(recipe, ["student.vocabulary=full"]))
    with pytest.raises(UserError, match=r"method\.logits_top_k is \d+, but there are \d+ tokens"):
        prepare(load_recipe(recipe))
