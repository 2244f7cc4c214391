"""Calibration rows of a language model come in batches whose logits fit into memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from toy import toy_dataset
from toy_recipe import toy_tokenizer

from layerdistill.context import LiveContext
from layerdistill.data import CALIBRATION, Collator
from layerdistill.evaluate import evaluator
from layerdistill.train.stage import StageInput


def batch_sizes(folder: Path, task: str, padding: str) -> list[int]:
    tokenizer = toy_tokenizer()
    collator = Collator(tokenizer, task, padding=padding, max_length=20)
    rows = {CALIBRATION: toy_dataset(task, 10, longest=12)}
    given = StageInput(task, rows, collator, tokenizer, {}, 0, folder, Console(quiet=True))
    return [len(batch["input_ids"]) for batch in LiveContext(given, ["perplexity"], batch_size=4).calibration()]


def test_batches_are_cut_to_the_longest_row_as_it_is_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch_sizes(tmp_path, "causal-lm", "max_length") == [4, 4, 2], "small logits: as many as asked for"
    # 60 token ids at 4 bytes for 20 positions: 3 rows have 14,400 bytes of logits.
    monkeypatch.setattr(evaluator, "LOGITS_BYTES", 14_400)
    assert batch_sizes(tmp_path, "causal-lm", "max_length") == [3, 3, 3, 1]
    assert batch_sizes(tmp_path, "causal-lm", "longest") == [4, 4, 2], "rows of at most 12 tokens: 11,520 bytes"
    assert batch_sizes(tmp_path, "sequence-classification", "max_length") == [4, 4, 2], "no logits per token"
    monkeypatch.setattr(evaluator, "LOGITS_BYTES", 1)
    assert batch_sizes(tmp_path, "causal-lm", "longest") == [1] * 10, "one row at least"
