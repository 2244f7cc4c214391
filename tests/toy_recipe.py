"""A complete tiny recipe on disk: a teacher folder with its tokenizer, data files, and the recipe as a dict."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from layerdistill.train.trainer import save_student

WORDS = [f"w{index}" for index in range(55)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def toy_tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 60 tokens that puts [CLS] and [SEP] around a text."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *(words or WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", eos_token="[SEP]", model_max_length=64,
    )  # fmt: skip


def write_teacher(folder: Path, family: str = "bert", head: str = "sequence-classification", **options: Any) -> Path:
    """Save a tiny teacher with its tokenizer."""
    model = tiny_model(family, head, **{"num_layers": 4, "hidden_size": 32, "num_heads": 4, "seed": 5, **options})
    save_student(model, folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def write_data(folder: Path, size: int = 96, seed: int = 0) -> None:
    """Write train.jsonl and validation.jsonl: a text's class is told by its first word."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    for split, rows in (("train", size), ("validation", 24)):
        lines = []
        for _ in range(rows):
            words = [generator.choice(WORDS) for _ in range(generator.randint(3, 10))]
            lines.append(json.dumps({"text": " ".join(words), "label": int(words[0][1:]) % 3}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def toy_recipe(folder: Path, method: str = "kd", **changes: Any) -> dict[str, Any]:
    """Write teacher and data below `folder` (once) and return a recipe for them; `changes` replace whole sections."""
    if not (folder / "teacher").exists():
        write_teacher(folder / "teacher")
        write_data(folder / "data")
    recipe: dict[str, Any] = {
        "teacher": {"model": str(folder / "teacher")},
        "student": {"num_blocks": 2, "hidden_size": 16, "init": "truncate"},
        "data": {
            "task": "sequence-classification",
            "train": str(folder / "data" / "train.jsonl"),
            "validation": str(folder / "data" / "validation.jsonl"),
            "text": "text",
            "max_length": 32,
        },
        "method": {"name": method},
        "training": {
            "max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_steps": 3,
            "logging_steps": 2,
        },
        "evaluation": {"latency": False},
        "output": str(folder / "run"),
        "seed": 7,
    }  # fmt: skip
    return {**recipe, **changes}
