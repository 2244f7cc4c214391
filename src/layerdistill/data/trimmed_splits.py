"""Tokenised splits in the ids of a trimmed vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from layerdistill.data.config import DataConfig
from layerdistill.data.labels import LabelSpace
from layerdistill.data.read_files import columns_of
from layerdistill.data.tokenise import tokenise
from layerdistill.data.tokenizer import padding_id
from layerdistill.data.trim_vocabulary import TrimmedVocabulary, trim_tokenizer


def trimmed_splits(
    whole: Mapping[str, Dataset],
    splits: Mapping[str, Dataset],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    space: LabelSpace,
    max_positions: int | None,
    needed: Iterable[int],
) -> tuple[TrimmedVocabulary, dict[str, Dataset]]:
    """Return the vocabulary of the training split (with the ids `needed` besides) and all splits in it.

    `whole` is what `tokenise` made of `splits` with the whole tokenizer. The training rows are the same with other
    numbers, to the last token, cut in the same places; other splits are tokenised anew, because words that the training
    split lacks come out in smaller pieces. Raises UserError like `trim_tokenizer` and `tokenise`.
    """
    # Padding is a special token, or id 0 of a tokenizer without any that fits.
    vocabulary = trim_tokenizer(tokenizer, {*used_ids(whole["train"]), *needed, padding_id(tokenizer)})
    columns = ["input_ids", "labels"] if config.kind.label_kind == "tokens" else ["input_ids"]
    others = {name: split for name, split in splits.items() if name != "train"}
    found = {"train": renumbered(whole["train"], vocabulary.kept, columns)}
    return vocabulary, found | tokenise(others, config, vocabulary.tokenizer, space, max_positions)


def used_ids(dataset: Dataset) -> set[int]:
    """Return every token id in a tokenised split."""
    return set(np.unique(_flat(_column(dataset, "input_ids"))).tolist())


def renumbered(dataset: Dataset, kept: Sequence[int], columns: Sequence[str]) -> Dataset:
    """Return a split in whose `columns` the id `kept[i]` is now i; negative labels (-100) stay.

    Raises ValueError for an id that is not kept.
    """
    table: pa.Table = columns_of(dataset, dataset.column_names)
    new = np.full(kept[-1] + 1, -1, dtype=np.int32)
    new[list(kept)] = np.arange(len(kept), dtype=np.int32)
    for name in columns:
        lists = _column(dataset, name)
        old = _flat(lists)
        if old.max(initial=0) > kept[-1] or (new[old[old >= 0]] < 0).any():
            raise ValueError(f"the column {name} holds token ids that are not kept")
        values = np.where(old < 0, old, new[np.maximum(old, 0)])
        offsets = lists.offsets.to_numpy() - lists.offsets[0].as_py()
        changed = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))
        table = table.set_column(table.column_names.index(name), name, changed)
    return Dataset(table)


def _column(dataset: Dataset, name: str) -> pa.ListArray:
    return pa.concat_arrays(columns_of(dataset, [name])[name].chunks)


def _flat(lists: pa.ListArray) -> np.ndarray:
    return lists.flatten().to_numpy()
