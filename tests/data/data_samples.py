"""Tiny files in every format and tiny tokenizers, all made on the spot."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertTokenizer, PreTrainedTokenizerFast

from layerdistill.data.config import DataConfig

Rows = Sequence[dict[str, Any]]

WORDS = ["good", "bad", "film", "the", "a", "very", "dull", "bright", "story", "1999", ".", ",", "he", "said"]


def write_rows(path: Path, rows: Rows) -> Path:
    """Write rows in the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


def config(**changes: Any) -> DataConfig:
    """A `data` section for in-memory rows with the columns `text` and `label`."""
    return DataConfig(**{"task": "sequence-classification", "train": "in-memory", "text": "text", **changes})


def bert_tokenizer() -> BertTokenizer:
    """WordPiece over `WORDS`: `[PAD]` 0, `[UNK]` 1, `[CLS]` 2, `[SEP]` 3, then the words from 4."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, like GPT-2 without merges: `<end>` is 256, no pad token; with `bos`, `<begin>` comes first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<begin>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 257)])
    special = {"eos_token": "<end>", **({"bos_token": "<begin>"} if bos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
