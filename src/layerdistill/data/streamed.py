"""Training text that is read, tokenised and cut into blocks while it is trained on, and never held in memory."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Features, IterableDataset, List, Value, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from layerdistill.core.errors import UserError, did_you_mean
from layerdistill.data.all_rows import all_rows
from layerdistill.data.config import IN_MEMORY, INSTALLED_DOCS, DataConfig
from layerdistill.data.pack import blocks, encode_stream
from layerdistill.data.read_files import known_suffix
from layerdistill.data.sources import hub_data, training_files

LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".txt": ("text", {"sample_by": "document"}),
}
"""What `datasets` reads a kind of file with, so that it gives the rows that `read_files` gives."""

FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "attention_mask": List(Value("int8")),
        "labels": List(Value("int32")),
        "example_id": Value("int64"),
        "length": Value("int32"),
    }
)
"""What `tokenise` gives for a language model."""


def streamed_blocks(
    config: DataConfig, base: Path | None, tokenizer: PreTrainedTokenizerBase, seed: int
) -> IterableDataset:
    """Return the training data of a packed causal LM as a stream of its blocks, the same ones that `tokenise` makes.

    The next block is drawn at random out of `config.shuffle_buffer`, in another order in each pass. The first block is
    read at once, so that most of what can be wrong is said before any model is loaded. Raises UserError for missing,
    empty or broken sources, a missing column, text that is not text, and too little of it for one block.
    """
    rows = streamed_rows(config, base)
    given = {"rows": rows, "config": config, "tokenizer": tokenizer}
    stream = IterableDataset.from_generator(_block_rows, features=FEATURES, gen_kwargs=given)
    if next(iter(stream), None) is None:
        raise UserError(
            f"data.train has fewer tokens in all than one block needs (data.max_length: {config.max_length}). Give "
            "more text or lower data.max_length."
        )
    if config.max_train_examples is not None:
        stream = stream.take(config.max_train_examples)
    return stream.shuffle(seed=seed, buffer_size=config.shuffle_buffer) if config.shuffle_buffer else stream


def streamed_rows(config: DataConfig, base: Path | None) -> IterableDataset:
    """Return the rows of `data.train`, read as they are asked for; raises UserError for a source that cannot be."""
    if config.train in (INSTALLED_DOCS, IN_MEMORY):
        raise UserError(
            f"data.streaming is true, but data.train is {config.train!r}, which is in memory. Name files or a hub id, "
            "or leave data.streaming out."
        )
    files = training_files(config, base)
    if files is None:
        return hub_data(str(config.train), "train", base, streaming=True)
    kinds = {known_suffix(path) for path in files}
    if len(kinds) > 1:
        raise UserError(
            f"data.streaming is true and data.train names files of {len(kinds)} kinds ({', '.join(sorted(kinds))}), "
            "but a stream is read from files of one kind. Give files that end alike."
        )
    loader, options = LOADERS[kinds.pop()]
    if loader == "csv":
        options = {**options, "converters": dict.fromkeys(config.text_columns, str), "keep_default_na": False}
    with _explained():
        return load_dataset(loader, data_files=[str(path) for path in files], split="train", streaming=True, **options)


def _block_rows(rows: IterableDataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
    stream = encode_stream(_texts(rows, config), tokenizer, config.separator)
    for number, block in enumerate(blocks(stream, config.max_length)):
        ids, length = block.tolist(), len(block)
        yield {
            "input_ids": ids, "attention_mask": [1] * length, "labels": ids, "example_id": number, "length": length,
        }  # fmt: skip


def _texts(rows: IterableDataset, config: DataConfig) -> Iterator[str]:
    column = config.text_columns[0]
    for number, row in enumerate(_read(rows)):
        if column not in row:
            raise UserError(
                f"data.train has no column {column!r} (data.text). It has: {', '.join(row)}.{did_you_mean(column, row)}"
            )
        text = row[column]
        if isinstance(text, str):
            yield text
        elif text is not None:
            raise UserError(f"data.train: column {column!r} (data.text) holds {text!r:.60} in row {number}, not text.")
        elif not config.drop_empty:
            raise UserError(
                f"data.train: column {column!r} has no text in row {number}. Fill it in, or drop such rows with "
                "data.drop_empty: true."
            )


def _read(rows: IterableDataset) -> Iterator[dict[str, Any]]:
    with _explained():
        yield from all_rows(rows)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"data.train cannot be read: {reason}. Check that its files are whole.") from error
