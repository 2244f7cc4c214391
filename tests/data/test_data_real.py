"""A hundred rows of real data sets go all the way to a batch; skipped where the data are not beside the project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import config

from layerdistill.data.collate import Collator
from layerdistill.data.labels import label_space
from layerdistill.data.load import load_splits
from layerdistill.data.tokenise import tokenise
from layerdistill.data.tokenizer import open_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA = "../shared/data"

pytestmark = pytest.mark.skipif(not (ROOT / DATA).is_dir(), reason=f"no real data in {DATA}")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sst2": ("bert-base-uncased", {"text": "sentence"}),
    "stsb": ("bert-base-uncased", {"task": "regression", "text": ["sentence1", "sentence2"]}),
    "wikitext2": ("gpt2", {"task": "causal-lm", "separator": "none", "stride": 64}),
}


@pytest.mark.parametrize("name", CASES)
def test_real_rows_become_batches(name: str) -> None:
    tokenizer_name, changes = CASES[name]
    section = config(**{"train": f"{DATA}/{name}", "max_train_examples": 100, "max_eval_examples": 100, **changes})
    splits = load_splits(section, base=ROOT)
    assert list(splits) == ["train", "validation", "test"]
    if section.task == "causal-lm":
        splits = {split: data.select(range(400)) for split, data in splits.items()}
    tokenizer = open_tokenizer(f"{DATA}/_tokenizers/{tokenizer_name}", base=ROOT)
    ready = tokenise(splits, section, tokenizer, label_space(splits, section))
    assert {split: len(data) for split, data in ready.items()} == dict.fromkeys(splits, 100)
    collator = Collator(tokenizer, section.task, max_length=section.max_length, pad_to_multiple_of=8)
    batch = collator([ready["train"][number] for number in range(16)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[1] <= section.max_length
    assert batch["input_ids"].max() < len(tokenizer)
    assert torch.isfinite(batch["labels"].float()).all()
    if section.task != "causal-lm":
        row = splits["train"][3]
        words = tokenizer.decode(ready["train"][3]["input_ids"], skip_special_tokens=True)
        squeezed = (row["text"] + row.get("text_pair", "")).lower().replace(" ", "")
        assert words.replace(" ", "") == squeezed
