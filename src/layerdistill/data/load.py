"""Splits of any source in one form: `example_id`, `text` (and `text_pair`), `label`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from layerdistill.core.errors import UserError, did_you_mean
from layerdistill.core.seeds import random_for
from layerdistill.data.config import DataConfig
from layerdistill.data.labels import missing_labels, read_labels, rows_named
from layerdistill.data.read_files import columns_of
from layerdistill.data.sources import Memory, read_sources

logger = logging.getLogger(__name__)

TEXTS = ("text", "text_pair")

MUCH = 0.1
"""Share of a split's text that is trained on, from which on it is worth a warning."""

SUBSET_SEED = 0
"""Subsets are the same in every run of a study, so that its seeds differ in training and not in data."""


def load_splits(config: DataConfig, base: Path | None = None, memory: Memory | None = None) -> dict[str, Dataset]:
    """Return the splits that exist among train, validation and test, checked, with the columns of this module's title.

    `base` is the recipe's folder: a relative path is looked for there first, then in the current folder. `memory` holds
    data handed over in Python and takes the place of what `config` names. Local data are read into memory; no network
    is used and nothing is written. `example_id` is the row's number in its source, before anything is dropped.
    `label` has the feature `ClassLabel`, `List(ClassLabel)` or float32; language models have none.

    Raises UserError for missing files and columns, empty splits, broken files, text that is not text or is blank, and
    labels that are missing, of the wrong kind, or unknown to the training data.
    """
    raw = read_sources(config, base, memory)
    if problems := [problem for split, dataset in raw.items() for problem in _column_problems(dataset, split, config)]:
        raise UserError(*problems)
    rows = {split: _usable_rows(dataset, split, config) for split, dataset in raw.items()}
    raw = {split: data if len(rows[split]) == len(data) else data.select(rows[split]) for split, data in raw.items()}
    labels, feature = read_labels(raw, config) if config.label_columns else ({}, None)
    splits = {split: _in_one_form(raw[split], rows[split], labels.get(split), feature, split, config) for split in raw}
    _warn_of_trained_texts(splits)
    return splits


def _warn_of_trained_texts(splits: Mapping[str, Dataset]) -> None:
    """Log a warning for splits of whose text much is trained on: by characters, for headings and blanks come again."""
    texts = {split: _whole_texts(dataset) for split, dataset in splits.items()}
    for split in splits.keys() - {"train"} if "train" in splits else ():
        trained = texts[split].filter(pc.is_in(texts[split], texts["train"]))
        share = _characters(trained) / max(_characters(texts[split]), 1)
        if share >= MUCH:
            logger.warning(
                "data.%s: %d of %d texts (%.0f %% of the characters) are in data.train too: what is measured on them "
                "says little of other texts.",
                split, len(trained), len(texts[split]), 100 * share,
            )  # fmt: skip


def _characters(texts: pa.ChunkedArray) -> int:
    return pc.sum(pc.utf8_length(texts)).as_py() or 0


def _whole_texts(dataset: Dataset) -> pa.ChunkedArray:
    """Return each row's text, with its pair."""
    table: pa.Table = columns_of(dataset, [name for name in TEXTS if name in dataset.column_names])
    return pc.binary_join_element_wise(*table.columns, "\0", null_handling="replace")


def _column_problems(dataset: Dataset, split: str, config: DataConfig) -> list[str]:
    problems = []
    there = dataset.column_names
    for field, columns in (("text", config.text_columns), ("label", config.label_columns)):
        for column in columns:
            if column not in there:
                problems.append(
                    f"data.{split} has no column {column!r} (data.{field}). It has: {', '.join(there)}."
                    f"{did_you_mean(column, there)}"
                )
            elif field == "text" and not _is_text(dataset.data.schema.field(column).type):
                problems.append(
                    f"data.{split}: column {column!r} (data.text) holds {dataset.data.schema.field(column).type}, not "
                    f"text. The columns: {', '.join(there)}."
                )
    return problems


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _usable_rows(dataset: Dataset, split: str, config: DataConfig) -> list[int]:
    """Return the numbers of the rows to keep; raises UserError for unusable ones unless `drop_empty` is set."""
    blank_allowed = config.kind.label_kind == "tokens"
    table: pa.Table = columns_of(dataset, config.text_columns)
    problems, unusable = [], set()
    for column in config.text_columns:
        text = table[column]
        full = pc.is_valid(text) if blank_allowed else pc.fill_null(pc.match_substring_regex(text, r"\S"), False)
        found = [number for number, ok in enumerate(full.to_pylist()) if not ok]
        unusable.update(found)
        if found:
            problems.append(f"data.{split}: column {column!r} has no text in {rows_named(found)}")
    if found := missing_labels(dataset, config.label_columns):
        unusable.update(found)
        problems.append(f"data.{split}: column {', '.join(config.label_columns)!r} has no label in {rows_named(found)}")
    if problems and not config.drop_empty:
        raise UserError(
            *(f"{problem}. Fill them in, or drop such rows with data.drop_empty: true." for problem in problems)
        )
    if len(unusable) == len(dataset):
        raise UserError(f"data.{split} has no usable row: {'; '.join(problems)}. Check data.text and data.label.")
    if unusable:
        logger.warning("data.%s: %d of %d rows dropped (no text or no label)", split, len(unusable), len(dataset))
    return [number for number in range(len(dataset)) if number not in unusable]


def _in_one_form(
    dataset: Dataset, rows: list[int], labels: list | None, feature: object, split: str, config: DataConfig
) -> Dataset:
    table: pa.Table = columns_of(dataset, config.text_columns)
    columns = {"example_id": pa.array(rows, pa.int64())}
    features = {"example_id": Value("int64")}
    for name, column in zip(TEXTS, config.text_columns, strict=False):
        columns[name] = table[column].cast(pa.string())
        features[name] = Value("string")
    if labels is not None:
        features["label"] = feature  # type: ignore[assignment]
        columns["label"] = pa.array(labels, Features({"label": feature}).arrow_schema.field("label").type)
    whole = Dataset(pa.table(columns, schema=Features(features).arrow_schema))
    limit = config.max_train_examples if split == "train" else config.max_eval_examples
    if limit is None or limit >= len(whole) or config.kind.label_kind == "tokens":
        return whole
    return whole.select(subset(len(whole), limit, split))


def subset(total: int, limit: int, split: str) -> list[int]:
    """Return `limit` row numbers of `total` in rising order; a larger limit contains every smaller one's rows."""
    order = list(range(total))
    random_for(SUBSET_SEED, "subset", split).shuffle(order)
    return sorted(order[:limit])
