"""Tiny data sets with something to learn in them, as tokenised lists of dicts and as `datasets.Dataset`."""

from __future__ import annotations

import random
from typing import Any

import torch
from datasets import Dataset

VOCABULARY = 64
PAD = 0


def toy_rows(task: str, size: int = 64, seed: int = 0, classes: int = 3, longest: int = 12) -> list[dict[str, Any]]:
    """Rows of different lengths; the class of a row is the remainder of its second token."""
    generator = random.Random(seed)
    rows = []
    for _ in range(size):
        length = generator.randint(4, longest)
        ids = [1, *(generator.randint(3, VOCABULARY - 1) for _ in range(length - 1))]
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * length}
        if task == "causal-lm":
            start = generator.randint(3, 20)
            row["input_ids"] = [1, *((start + 2 * step) % (VOCABULARY - 3) + 3 for step in range(length - 1))]
            row["labels"] = list(row["input_ids"])
        elif task == "regression":
            row["labels"] = (ids[1] % classes) / classes
        elif task == "multi-label-classification":
            row["labels"] = [float(ids[1] % 2), float(ids[2] % 2), float(ids[3] % 2)]
        else:
            row["labels"] = ids[1] % classes
        rows.append(row)
    return rows


def toy_dataset(task: str, size: int = 64, seed: int = 0, **options: Any) -> Dataset:
    """The rows as a `datasets.Dataset`."""
    return Dataset.from_list(toy_rows(task, size, seed, **options))


class ToyCollator:
    """Pads to the longest row (or to `to`) with token 0; labels of a language model are padded with -100."""

    def __init__(self, task: str, to: int | None = None) -> None:
        self.task = task
        self.to = to

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = self.to or max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.tensor([row["input_ids"] + [PAD] * (longest - len(row["input_ids"])) for row in rows]),
            "attention_mask": torch.tensor(
                [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
            ),
        }
        if self.task == "causal-lm":
            batch["labels"] = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows])
        else:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch
