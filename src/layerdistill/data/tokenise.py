"""Texts into model inputs: `input_ids`, `attention_mask`, (`token_type_ids`), `labels`, `example_id`, `length`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from layerdistill.core.errors import UserError
from layerdistill.data.config import DataConfig
from layerdistill.data.labels import LabelSpace, rows_named
from layerdistill.data.pack import Tokens, blocks, encode_documents, encode_stream, windows
from layerdistill.data.read_files import columns_of

logger = logging.getLogger(__name__)

BATCH = 1000
"""Examples given to the tokenizer at once."""
NO_LIMIT = 10**9
"""Tokenizers that know no limit say 10**30."""

NO_TOKENS = np.empty(0, dtype=np.int32)
IDS = pa.list_(pa.int32())
MASK = pa.list_(pa.int8())
TYPES = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": MASK}


def tokenise(
    splits: Mapping[str, Dataset],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    space: LabelSpace,
    max_positions: int | None = None,
) -> dict[str, Dataset]:
    """Return model inputs for splits that came from `load_splits`, in memory; the result depends on nothing else.

    `length` is the number of tokens (the Trainer's `length_column_name`). `example_id` is the row's number in its
    source, or the number of the block or window where a causal LM packs. `labels` is an id, a 0/1 float vector
    `(classes,)`, a float, or for a causal LM a list `(seq,)` that the model shifts itself. Longer texts are cut to
    `max_length` and counted in a warning. `max_positions` is the shorter of the models' position limits; without
    it the tokenizer's own limit holds. Raises UserError when `max_length` is beyond that limit or leaves no room for
    text, when a text gives no token, and when a language model's split is too short for one block.
    """
    _check_length(config, tokenizer, max_positions)
    if config.kind.label_kind == "tokens":
        return {split: _language_model_inputs(data, split, config, tokenizer) for split, data in splits.items()}
    return {split: _example_inputs(data, split, config, tokenizer, space) for split, data in splits.items()}


def _check_length(config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> None:
    limit = tokenizer.model_max_length if max_positions is None else max_positions
    if config.max_length > limit and limit < NO_LIMIT:
        whose = "the tokenizer allows" if max_positions is None else "the models have positions for"
        raise UserError(
            f"data.max_length is {config.max_length}, but {whose} {limit} tokens. Set it to at most {limit}."
        )
    pair = len(config.text_columns) == 2
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    least = special + len(config.text_columns)
    if config.max_length < least:
        raise UserError(
            f"data.max_length is {config.max_length}, but {special} special tokens are added to every example, which "
            f"leaves no room for text. Set it to at least {least}; 64 or more is usual."
        )


def _example_inputs(
    dataset: Dataset, split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, space: LabelSpace
) -> Dataset:
    table = columns_of(dataset, dataset.column_names)
    sides = [table[name].to_pylist() for name in ("text", "text_pair") if name in table.column_names]
    names = [name for name in TYPES if name in tokenizer.model_input_names]
    chunks: dict[str, list[pa.Array]] = {name: [] for name in names}
    cut = 0
    for start in range(0, len(dataset), BATCH):
        batch = [side[start : start + BATCH] for side in sides]
        encoded = tokenizer(*batch, verbose=False)
        rows = {name: list(encoded[name]) for name in names}
        cut += _cut_long_rows(rows, batch, config.max_length, tokenizer)
        for name in names:
            chunks[name].append(pa.array(rows[name], TYPES[name]))
    example_ids = table["example_id"].to_pylist()
    inputs = {name: pa.chunked_array(chunks[name]) for name in names}
    lengths = pc.list_value_length(inputs["input_ids"]).to_pylist()
    if none := [example_id for example_id, length in zip(example_ids, lengths, strict=True) if length == 0]:
        raise UserError(
            f"data.{split}: the tokenizer makes no token of the text in {rows_named(none)}. Drop these rows."
        )
    if cut:
        logger.warning(
            "data.%s: %d of %d examples are longer than max_length=%d tokens and were cut",
            split,
            cut,
            len(dataset),
            config.max_length,
        )
    labels = _label_array(table["label"], space) if "label" in table.column_names else None
    return _dataset(inputs, example_ids, labels)


def _cut_long_rows(
    rows: dict[str, list[list[int]]], batch: Sequence[list[str]], limit: int, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Replace, in place, the rows above `limit` tokens by their cut form (the longer text of a pair gives first)."""
    long = [number for number, ids in enumerate(rows["input_ids"]) if len(ids) > limit]
    if long:
        encoded = tokenizer(*([side[number] for number in long] for side in batch), truncation=True, max_length=limit)
        for name, column in rows.items():
            for number, row in zip(long, encoded[name], strict=True):
                column[number] = row
    return len(long)


def _label_array(labels: pa.ChunkedArray, space: LabelSpace) -> pa.Array:
    if space.problem_type == "multi_label_classification":
        vectors = np.zeros((len(labels), space.num_labels), dtype=np.float32)
        for row, ids in zip(vectors, labels.to_pylist(), strict=True):
            row[ids] = 1.0
        return pa.array(list(vectors), pa.list_(pa.float32()))
    return labels.combine_chunks()


def _language_model_inputs(
    dataset: Dataset, split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    texts = columns_of(dataset, ["text"])["text"].to_pylist()
    training = split == "train"
    if not config.pack:
        ids, numbers = _single_documents(texts, split, config, tokenizer)
        labels = ids
    else:
        stream = np.concatenate([NO_TOKENS, *encode_stream(texts, tokenizer, config.separator)])
        pairs = (
            [(block, block) for block in blocks([stream], config.max_length)]
            if training
            else windows(stream, config.max_length, config.stride)
        )
        if not pairs:
            raise UserError(
                f"data.{split} has {len(stream)} tokens in all, but {config.max_length if training else 2} are needed "
                "for one block. Give more text" + (" or lower data.max_length." if training else ".")
            )
        ids, labels = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        numbers = list(range(len(ids)))
    limit = config.max_train_examples if training else config.max_eval_examples
    ids, labels, numbers = ids[:limit], labels[:limit], numbers[:limit]
    masks = [np.ones(len(row), dtype=np.int8) for row in ids]
    inputs = {"input_ids": pa.array(ids, IDS), "attention_mask": pa.array(masks, MASK)}
    return _dataset(inputs, numbers, pa.array(labels, IDS))


def _single_documents(
    texts: list[str], split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Tokens], list[int]]:
    documents = encode_documents(texts, tokenizer, end=config.separator == "eos")
    kept = [number for number, ids in enumerate(documents) if len(ids) >= 2]
    cut = sum(len(documents[number]) > config.max_length for number in kept)
    if not kept:
        raise UserError(f"data.{split}: no document has two tokens or more, so there is nothing to predict. Give text.")
    if len(kept) < len(documents) or cut:
        logger.warning(
            "data.%s: of %d documents, %d have fewer than two tokens and were left out, %d are longer than "
            "max_length=%d and were cut",
            split,
            len(documents),
            len(documents) - len(kept),
            cut,
            config.max_length,
        )
    return [documents[number][: config.max_length] for number in kept], kept


def _dataset(inputs: Mapping[str, Any], example_ids: list[int], labels: pa.Array | None) -> Dataset:
    columns = dict(inputs)
    if labels is not None:
        columns["labels"] = labels
    columns["example_id"] = pa.array(example_ids, pa.int64())
    columns["length"] = pc.list_value_length(inputs["input_ids"])
    return Dataset(pa.table(columns))
