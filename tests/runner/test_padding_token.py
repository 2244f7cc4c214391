"""Decoders that classify read the last token that is not `config.pad_token_id`: batches are filled up with that one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from toy import toy_dataset
from toy_recipe import SPECIAL, WORDS, toy_recipe, toy_tokenizer, write_data, write_teacher
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Gemma3Config, PreTrainedTokenizerFast

import layerdistill as ld
from layerdistill.core.errors import UserError
from layerdistill.core.padding import padding_token, set_padding
from layerdistill.measurement import evaluate_folder
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


@pytest.mark.parametrize("pad_token_id", [0, 7, END, None, -1])
def test_a_teacher_says_in_batches_what_it_says_text_by_text(tmp_path: Path, pad_token_id: int | None) -> None:
    recipe = decoder_recipe(tmp_path, pad_token_id)
    result = run(recipe, console=Console(quiet=True))
    folder = tmp_path / "teacher"
    teacher = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (tmp_path / "data" / "validation.jsonl").read_text().splitlines()]
    right = []
    for row in rows:
        with torch.no_grad():
            said = teacher(input_ids=torch.tensor([tokenizer(row["text"])["input_ids"]])).logits.argmax().item()
        right.append(said == row["label"])
    share = sum(right) / len(right)
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
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "other").eval()
    rows = [json.loads(line) for line in (tmp_path / "data" / "validation.jsonl").read_text().splitlines()]
    with torch.no_grad():
        right = [
            model(input_ids=torch.tensor([own(row["text"])["input_ids"]])).logits.argmax().item() == row["label"]
            for row in rows
        ]
    assert found == sum(right) / len(right)


def test_of_a_configuration_with_parts_the_one_about_text_counts() -> None:
    config = Gemma3Config(text_config={"vocab_size": 20, "pad_token_id": 7})
    assert padding_token(config) == 7
    bare = Gemma3Config(text_config={"vocab_size": 20, "pad_token_id": None})
    set_padding(bare, 25)
    assert padding_token(bare) is None, "no row of the embedding"
    set_padding(bare, 5)
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
