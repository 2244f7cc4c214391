"""Data files and recipes of every task for a word-level tokenizer of 60 tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from toy_recipe import WORDS, toy_recipe, toy_tokenizer, write_teacher

TASKS = ("sequence-classification", "pairs", "multi-label-classification", "regression", "causal-lm")
TAGS = ("even", "third", "high")


def row_for(task: str, generator: random.Random) -> dict[str, Any]:
    """One row of a data file; what is to be learned stands in its first words."""
    words = [generator.choice(WORDS) for _ in range(generator.randint(3, 10))]
    number = int(words[0][1:])
    row: dict[str, Any] = {"text": " ".join(words)}
    if task == "multi-label-classification":
        has = dict(zip(TAGS, (number % 2 == 0, number % 3 == 0, number > 30), strict=True))
        return {**row, "label": [name for name in TAGS if has[name]]}
    if task == "regression":
        return {**row, "label": number / 55}
    if task == "pairs":
        return {**row, "second": " ".join(reversed(words[:3])), "label": number % 3}
    return row if task == "causal-lm" else {**row, "label": number % 3}


def write_rows(path: Path, task: str, size: int, seed: int) -> None:
    """Write a jsonl file."""
    generator = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row_for(task, generator)) + "\n" for _ in range(size)))


def task_recipe(folder: Path, task: str, method: str = "kd") -> dict[str, Any]:
    """Write teacher and data of a task below `folder` and return a recipe for them."""
    recipe = toy_recipe(folder, method)
    if task == "causal-lm":
        # More rows than the tokenizer has tokens, as in models whose vocabulary is padded to a round number.
        write_teacher(folder / "gpt2", "gpt2", "causal-lm", vocab_size=64)
        recipe["teacher"] = {"model": str(folder / "gpt2")}
    elif task in ("multi-label-classification", "regression"):
        labels = 1 if task == "regression" else len(TAGS)
        kind = "regression" if task == "regression" else "multi_label_classification"
        write_teacher(folder / task, num_labels=labels, problem_type=kind)
        recipe["teacher"] = {"model": str(folder / task)}
    for split, size, seed in (("train", 50, 1), ("validation", 20, 2)):
        write_rows(folder / task / f"{split}.jsonl", task, size, seed)
        recipe["data"][split] = str(folder / task / f"{split}.jsonl")
    recipe["data"]["task"] = "sequence-classification" if task == "pairs" else task
    recipe["data"]["max_length"] = 16 if task == "causal-lm" else 32
    if task == "pairs":
        recipe["data"]["text"] = ["text", "second"]
        tokenizer = toy_tokenizer()
        names = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
        tokenizer.save_pretrained(folder / "teacher")
    return recipe
