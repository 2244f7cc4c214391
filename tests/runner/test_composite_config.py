"""Models of text and pictures keep what concerns text in a configuration inside their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from rich.console import Console
from toy_recipe import toy_recipe, toy_tokenizer

from layerdistill.core.errors import UserError
from layerdistill.plan import show_plan
from layerdistill.recipe import load_recipe
from layerdistill.runner import run

TEXT = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 16, "head_dim": 8, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
PICTURES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.mark.parametrize("method", ["kd", "cka"])
def test_they_are_distilled_as_text_alone(method: str, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, method, student={"num_blocks": 2})
    torch.manual_seed(0)
    config = hf.Gemma3Config(num_labels=3, text_config=TEXT, vision_config=PICTURES)
    hf.Gemma3ForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    toy_tokenizer().save_pretrained(tmp_path / "teacher")
    show_plan(load_recipe(recipe), Console(quiet=True))
    result = run(recipe, console=Console(quiet=True))
    teacher = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher").eval()
    rows = [json.loads(line) for line in (tmp_path / "data" / "validation.jsonl").read_text().splitlines()]
    with torch.no_grad():
        said = [
            teacher(torch.tensor([toy_tokenizer()(row["text"])["input_ids"]])).logits.argmax().item() for row in rows
        ]
    assert result.teacher_metrics["accuracy"] == sum(
        answer == row["label"] for answer, row in zip(said, rows, strict=True)
    ) / len(rows)
    student = hf.AutoModelForSequenceClassification.from_pretrained(result.student)
    assert student.config.get_text_config().num_hidden_layers == 2


@pytest.mark.parametrize("vocabulary", ["full", "trimmed"])
def test_so_are_language_models(vocabulary: str, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "cka", student={"num_blocks": 2, "vocabulary": vocabulary})
    recipe["data"] |= {"task": "causal-lm", "max_length": 16}
    torch.manual_seed(0)
    config = hf.Gemma3Config(text_config=TEXT, vision_config=PICTURES)
    hf.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "teacher")
    toy_tokenizer().save_pretrained(tmp_path / "teacher")
    result = run(recipe, console=Console(quiet=True))
    assert result.metrics["perplexity"] == pytest.approx(60, rel=0.1), "of 60 tokens at random"
    student = hf.AutoModelForCausalLM.from_pretrained(result.student)
    assert student.config.get_text_config().num_hidden_layers == 2


@pytest.mark.parametrize("method", [{"name": "iskd"}, {"name": "l1_prune", "removed": 0.3}])
def test_blocks_of_pictures_are_not_rebuilt(method: dict[str, Any], tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path) | {"method": method}
    del recipe["student"]
    hf.Gemma3ForSequenceClassification(
        hf.Gemma3Config(num_labels=3, text_config=TEXT, vision_config=PICTURES)
    ).save_pretrained(tmp_path / "teacher")
    toy_tokenizer().save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"compact block cannot be made|more blocks than those of its language model"):
        run(recipe, console=Console(quiet=True))
