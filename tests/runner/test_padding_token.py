"""Decoders that classify read the last token that is not `config.pad_token_id`: batches are filled up with that one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from task_recipes import task_recipe
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from toy import toy_dataset
from toy_recipe import SPECIAL, WORDS, toy_recipe, toy_tokenizer, write_data, write_teacher
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3Config,
    PreTrainedTokenizerFast,
)

import layerdistill as ld
from layerdistill.core.errors import UserError
from layerdistill.core.padding import ends_at_padding, padding_token, set_padding
from layerdistill.data import Collator
from layerdistill.finetune import kept_teachers
from layerdistill.measurement import evaluate_folder, identity_of
from layerdistill.prepare import prepare
from layerdistill.recipe import load_recipe
from layerdistill.runner import run

END = 3


def unpadded_tokenizer() -> PreTrainedTokenizerFast:
    """One without a pad token, as most language models bring: an end of text is what fills up."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[SEP]", model_max_length=64)


def decoder_recipe(folder: Path, pad_token_id: int | None) -> dict[str, Any]:
    write_teacher(folder / "teacher", "llama")
    write_data(folder / "data")
    unpadded_tokenizer().save_pretrained(folder / "teacher")
    config = folder / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": pad_token_id}))
    recipe = toy_recipe(folder, "kd", evaluation={"cost": False, "batch_size": 5})
    recipe["data"]["pad_to_multiple_of"] = 8
    return recipe


def text_by_text(model_folder: Path, folder: Path) -> float:
    """The accuracy of a model that is asked by plain transformers, without any padding."""
    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = [json.loads(line) for line in (folder / "data" / "validation.jsonl").read_text().splitlines()]
    right = []
    for row in rows:
        with torch.no_grad():
            said = model(input_ids=torch.tensor([tokenizer(row["text"])["input_ids"]])).logits.argmax().item()
        right.append(said == row["label"])
    return sum(right) / len(right)


@pytest.mark.parametrize("pad_token_id", [0, 7, END, None, -1])
def test_a_teacher_says_in_batches_what_it_says_text_by_text(tmp_path: Path, pad_token_id: int | None) -> None:
    recipe = decoder_recipe(tmp_path, pad_token_id)
    result = run(recipe, console=Console(quiet=True))
    folder = tmp_path / "teacher"
    share = text_by_text(folder, tmp_path)
    assert result.teacher_metrics["accuracy"] == share
    assert evaluate_folder(str(folder), load_recipe(recipe))["model"]["accuracy"] == share
    student = evaluate_folder(str(result.folder), load_recipe(recipe))["model"]["accuracy"]
    assert student == result.metrics["accuracy"]
    written = json.loads((result.student / "config.json").read_text())
    assert written["pad_token_id"] == (END if pad_token_id in (None, -1) else pad_token_id)


def test_models_that_take_different_tokens_for_padding_are_refused(tmp_path: Path) -> None:
    recipe = decoder_recipe(tmp_path, 0)
    write_teacher(tmp_path / "student", "llama", num_layers=2, pad_token_id=7)
    unpadded_tokenizer().save_pretrained(tmp_path / "student")
    recipe["student"] = {"model": str(tmp_path / "student")}
    expected = r"pad_token_id is 0 in the teacher's configuration and 7 in the student's.*config\.json"
    with pytest.raises(UserError, match=expected):
        run(recipe, console=Console(quiet=True))
    teacher, student = (
        tiny_model("llama", "sequence-classification", num_layers=4 - pad % 3, pad_token_id=pad) for pad in (0, 7)
    )
    args = ld.LayerDistillationConfig(output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True)
    rows = toy_dataset("sequence-classification", size=8)
    with pytest.raises(UserError, match=expected):
        ld.distill(teacher, student, rows, method="kd", args=args, processing_class=unpadded_tokenizer())


def own_student(folder: Path, family: str, **config: Any) -> dict[str, Any]:
    """The student section of a model that was not cut out of the teacher."""
    write_teacher(folder, family, num_layers=2, **config)
    unpadded_tokenizer().save_pretrained(folder)
    return {"model": str(folder)}


@pytest.mark.parametrize(
    ("teacher", "student", "filler"),
    [
        (("llama", None), ("llama", 7), 7),
        (("llama", 7), ("llama", None), 7),
        (("bert", 0), ("llama", 7), 7),
        (("llama", 7), ("roberta", 1), 7),
        (("roberta", 1), ("bert", 0), 1),
        (("bert", None), ("bert", None), END),
    ],
)
def test_the_model_that_needs_it_says_what_fills_up(
    teacher: tuple[str, int | None], student: tuple[str, int | None], filler: int, tmp_path: Path
) -> None:
    recipe = decoder_recipe(tmp_path, None)
    write_teacher(tmp_path / "teacher", teacher[0], pad_token_id=teacher[1])
    recipe["student"] = own_student(tmp_path / "student", student[0], pad_token_id=student[1])
    prepared = prepare(load_recipe(recipe))
    assert prepared.collator.filler == filler
    result = run(recipe, console=Console(quiet=True))
    found = evaluate_folder(str(result.folder), load_recipe(recipe))["model"]["accuracy"]
    assert found == result.metrics["accuracy"]


def test_the_end_of_a_text_is_trained_where_it_fills_up_a_language_model(tmp_path: Path) -> None:
    recipe = task_recipe(tmp_path, "causal-lm", "kd")
    unpadded_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for split in ("train", "validation"):
        path = Path(recipe["data"][split])
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "text": f"{row['text']} [SEP]"}) + "\n" for row in rows))
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    recipe["teacher"] = {
        "architecture": {"model_type": "llama", "tie_word_embeddings": False, **shape}, "finetune": {"max_steps": 2}
    }  # fmt: skip
    recipe["data"]["tokenizer"] = str(tmp_path / "tokenizer")
    recipe["student"] = {"num_blocks": 1}
    student = run(recipe, console=Console(quiet=True)).student
    embedding = AutoModelForCausalLM.from_pretrained(student).model.embed_tokens
    assert embedding.padding_idx is None
    assert embedding.weight[END].norm() > 0.01
    assert json.loads((student / "config.json").read_text())["pad_token_id"] is None


def test_padding_that_the_other_model_has_no_row_for_is_refused(tmp_path: Path) -> None:
    recipe = decoder_recipe(tmp_path, None)
    write_teacher(tmp_path / "teacher", "llama", vocab_size=64, pad_token_id=63)
    unpadded_tokenizer().save_pretrained(tmp_path / "teacher")
    recipe["student"] = own_student(tmp_path / "student", "llama", vocab_size=60, pad_token_id=None)
    with pytest.raises(UserError, match=r"pad_token_id is 63 in the configuration of the teacher.*60 token ids"):
        run(recipe, console=Console(quiet=True))
    recipe |= {"method": {"name": "none"}}
    result = run(recipe, console=Console(quiet=True))
    assert result.teacher_metrics["accuracy"] == text_by_text(tmp_path / "teacher", tmp_path), "each by itself"
    cut = {**recipe, "student": {"num_blocks": 2}, "output": str(tmp_path / "cut")}
    assert run(cut, console=Console(quiet=True)).teacher_metrics == result.teacher_metrics


def test_kept_predictions_are_of_batches_that_were_filled_up_alike(tmp_path: Path) -> None:
    recipe = load_recipe(decoder_recipe(tmp_path, 0))
    prepared = prepare(recipe)
    model = tiny_model("llama", "sequence-classification", pad_token_id=0)
    rows = prepared.datasets["validation"]
    unlike, usual = (
        identity_of(model, Collator(prepared.tokenizer, "sequence-classification", padding_token=token), rows, recipe)
        for token in (0, END)
    )
    assert unlike != usual
    encoder = tiny_model("bert", "sequence-classification", pad_token_id=0)
    unlike, usual = (
        identity_of(encoder, Collator(prepared.tokenizer, "sequence-classification", padding_token=token), rows, recipe)
        for token in (0, END)
    )
    assert unlike == usual, "what fills up changes no answer of an encoder"


def test_models_that_are_asked_one_by_one_may_be_filled_up_differently(tmp_path: Path) -> None:
    recipe = decoder_recipe(tmp_path, 0)
    recipe["student"] = own_student(tmp_path / "student", "llama", pad_token_id=7)
    recipe["method"] = {"name": "none"}
    result = run(recipe, console=Console(quiet=True))
    assert result.teacher_metrics["accuracy"] == text_by_text(tmp_path / "teacher", tmp_path)
    assert result.metrics["accuracy"] == text_by_text(result.student, tmp_path)
    together = load_recipe({**recipe, "method": {"name": "kd"}})
    for folder in (tmp_path / "teacher", result.folder):
        found = evaluate_folder(str(folder), together)["model"]["accuracy"]
        assert found == text_by_text(result.student if folder == result.folder else folder, tmp_path)


def test_a_teacher_is_fitted_to_the_task_with_its_own_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERDISTILL_HOME", str(tmp_path / "home"))
    recipe = decoder_recipe(tmp_path, 7)
    recipe["teacher"] |= {"finetune": {"max_steps": 3, "per_device_train_batch_size": 8}}
    recipe |= {"student": own_student(tmp_path / "student", "llama", pad_token_id=0), "method": {"name": "none"}}
    apart = run(recipe, console=Console(quiet=True))
    cut = {**recipe, "student": {"num_blocks": 2}, "output": str(tmp_path / "cut")}
    assert run(cut, console=Console(quiet=True)).teacher_metrics == apart.teacher_metrics
    assert len(list(kept_teachers().glob("*/config.json"))) == 1


def test_padding_that_a_trimmed_vocabulary_would_lose_is_refused(tmp_path: Path) -> None:
    recipe = decoder_recipe(tmp_path, None)
    write_teacher(tmp_path / "teacher", "llama", vocab_size=64, pad_token_id=63)
    unpadded_tokenizer().save_pretrained(tmp_path / "teacher")
    recipe["student"] = {"num_blocks": 2, "vocabulary": "trimmed"}
    with pytest.raises(UserError, match=r"'trimmed', but pad_token_id is 63.*no such token.*vocabulary: full"):
        run(recipe, console=Console(quiet=True))


def test_a_pad_token_that_only_the_tokenizer_has_fills_up_nothing(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    recipe = toy_recipe(tmp_path, "none", evaluation={"cost": False})
    del recipe["teacher"]
    recipe["student"] = own_student(tmp_path / "student", "llama", vocab_size=60, pad_token_id=None)
    tokenizer = unpadded_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[FILL]"})
    tokenizer.save_pretrained(tmp_path / "student")
    assert tokenizer.pad_token_id == 60
    result = run(recipe, console=Console(quiet=True))
    assert result.metrics["accuracy"] == text_by_text(result.student, tmp_path)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_gets_what_its_decoder_begins_with(family: str, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "none", evaluation={"cost": False})
    write_teacher(tmp_path / "teacher", family)
    config = tmp_path / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": None}))
    recipe["student"] = {"num_blocks": 2}
    result = run(recipe, console=Console(quiet=True))
    assert json.loads((result.student / "config.json").read_text())["pad_token_id"] == 0


@pytest.mark.parametrize(("kind", "answer"), [("xlnet", False), ("bert", False), ("gpt2", True), ("t5gemma", True)])
def test_who_finds_the_end_of_a_text_by_its_padding(kind: str, answer: bool) -> None:
    config = AutoConfig.for_model(kind)
    assert ends_at_padding(config, "regression") is answer
    assert not ends_at_padding(config, "causal-lm")
    config.model_type = "one-with-code-of-its-own"
    assert ends_at_padding(config, "regression")


def test_a_teacher_of_another_vocabulary_has_no_say(tmp_path: Path) -> None:
    recipe = decoder_recipe(tmp_path, 300)
    write_teacher(tmp_path / "teacher", "llama", vocab_size=320, pad_token_id=300)
    toy_tokenizer([*WORDS, "more"]).save_pretrained(tmp_path / "teacher")
    student = own_student(tmp_path / "student", "llama", pad_token_id=None)
    recipe |= {"student": student, "method": {"name": "none"}}
    assert prepare(load_recipe(recipe)).collator.filler == END
    assert run(recipe, console=Console(quiet=True)).metrics
    models = [
        tiny_model("llama", "sequence-classification", vocab_size=size, pad_token_id=size - 4) for size in (320, 64)
    ]
    args = ld.LayerDistillationConfig(output_dir=str(tmp_path / "python"), max_steps=1, use_cpu=True)
    rows = toy_dataset("sequence-classification", size=8)
    ld.distill(*models, rows, method="none", args=args, processing_class=unpadded_tokenizer())


def test_a_model_with_a_tokenizer_of_its_own_is_evaluated_with_its_own(tmp_path: Path) -> None:
    recipe = decoder_recipe(tmp_path, 63)
    write_teacher(tmp_path / "other", "llama", vocab_size=60, pad_token_id=None)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, *SPECIAL])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[SEP]")
    own.save_pretrained(tmp_path / "other")
    found = evaluate_folder(str(tmp_path / "other"), load_recipe(recipe))["model"]["accuracy"]
    assert found == text_by_text(tmp_path / "other", tmp_path)


def test_of_a_configuration_with_parts_the_one_about_text_counts() -> None:
    config = Gemma3Config(text_config={"vocab_size": 20, "pad_token_id": 7})
    assert padding_token(config) == 7
    bare = Gemma3Config(text_config={"vocab_size": 20, "pad_token_id": None})
    set_padding(bare, "regression", 25)
    assert padding_token(bare) is None, "no row of the embedding"
    set_padding(bare, "regression", 5)
    assert padding_token(bare) == 5


def test_an_architecture_without_padding_gets_it(tmp_path: Path) -> None:
    recipe = decoder_recipe(tmp_path, None)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    recipe["teacher"] = {"architecture": {"model_type": "llama", **shape}, "finetune": {"max_steps": 2}}
    recipe["data"]["tokenizer"] = str(tmp_path / "teacher")
    assert run(recipe, console=Console(quiet=True)).metrics


def test_in_python_too_batches_are_filled_up_with_what_the_models_know(tmp_path: Path) -> None:
    models = [tiny_model("llama", "sequence-classification", num_layers=n, pad_token_id=7) for n in (4, 2)]
    args = ld.LayerDistillationConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    rows = toy_dataset("sequence-classification", size=8)
    trainer = ld.LayerDistillationTrainer(models[1], models[0], "kd", args, rows, processing_class=unpadded_tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()
    assert (batch["attention_mask"] == 0).any()


def test_a_cache_of_texts_that_were_filled_up_otherwise_is_another(tmp_path: Path) -> None:
    folders = []
    for pad_token_id in (END, 0):
        recipe = decoder_recipe(tmp_path / str(pad_token_id), pad_token_id)
        place = tmp_path / "cache"
        recipe["teacher"] |= {"cache": "fill", "cache_folder": str(place)}
        if not folders:
            folders.append(run(recipe, console=Console(quiet=True)).folder)
            continue
        with pytest.raises(UserError, match="padding token"):
            run(recipe, console=Console(quiet=True))
