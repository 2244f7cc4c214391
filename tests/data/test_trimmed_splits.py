"""Splits in the ids of a trimmed vocabulary: the training rows to the last token, the others tokenised anew."""

from __future__ import annotations

from typing import Any

import pytest
from data_samples import byte_tokenizer, config
from datasets import Dataset
from test_trim_vocabulary import bert, byte_level, corpus
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from layerdistill.data import label_space, load_splits, tokenise, trimmed_splits
from layerdistill.data.tokenizer import padding_id
from layerdistill.data.trimmed_splits import renumbered, used_ids


def made(tokenizer: Any, needed: tuple[int, ...] = (), **changes: Any) -> tuple[Any, Any, Any]:
    """The splits of whole and trimmed vocabulary, and the latter."""
    section = config(**{"validation": "in-memory", **changes})
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(corpus(40))]
    memory = {"train": rows[:15], "validation": rows[15:]}
    splits = load_splits(section, memory=memory)
    space = label_space(splits, section)
    whole = tokenise(splits, section, tokenizer, space)
    vocabulary, trimmed = trimmed_splits(whole, splits, section, tokenizer, space, None, needed)
    return whole, trimmed, vocabulary


def test_training_rows_are_the_same_and_others_are_read_by_the_trimmed_tokenizer() -> None:
    whole, trimmed, vocabulary = made(bert(), max_length=12)
    assert trimmed.keys() == whole.keys()
    for row, old in zip(trimmed["train"], whole["train"], strict=True):
        assert [vocabulary.kept[number] for number in row["input_ids"]] == old["input_ids"]
        assert {**row, "input_ids": None} == {**old, "input_ids": None}
    assert any(len(row) == 12 for row in whole["train"]["input_ids"]), "some are cut"
    assert trimmed["train"].column_names == whole["train"].column_names
    texts = corpus(40)[15:]
    ids = vocabulary.tokenizer(texts, truncation=True, max_length=12)["input_ids"]
    assert trimmed["validation"]["input_ids"][:] == ids
    assert trimmed["validation"]["labels"][:] == whole["validation"]["labels"][:]


def test_labels_of_a_language_model_are_renumbered_and_the_ignored_ones_stay() -> None:
    changes = {"task": "causal-lm", "max_length": 16, "stride": 8}
    whole, trimmed, vocabulary = made(byte_level(), **changes)
    for row, old in zip(trimmed["train"], whole["train"], strict=True):
        for name in ("input_ids", "labels"):
            assert [vocabulary.kept[number] for number in row[name]] == old[name]
    assert {label for row in trimmed["validation"]["labels"] for label in row if label < 0} == {-100}
    rows = Dataset.from_dict({"input_ids": [[5, 7]], "labels": [[-100, 7]]})
    assert renumbered(rows, [5, 7], ["input_ids", "labels"])[0] == {"input_ids": [0, 1], "labels": [-100, 1]}


def test_only_the_training_split_says_what_is_needed() -> None:
    whole, _, vocabulary = made(bert(), max_train_examples=4)
    assert used_ids(whole["train"]) <= set(vocabulary.kept)
    assert not used_ids(whole["validation"]) <= set(vocabulary.kept)
    missing = max(used_ids(whole["validation"]) - set(vocabulary.kept))
    assert missing in made(bert(), (missing,), max_train_examples=4)[2].kept
    with pytest.raises(ValueError, match="not kept"):
        renumbered(whole["validation"], vocabulary.kept, ["input_ids"])
    selected = whole["train"].select([3, 1])
    assert [len(row) for row in renumbered(selected, vocabulary.kept, ["input_ids"])["input_ids"]] == [
        len(row) for row in selected["input_ids"]
    ]


def test_what_fills_up_batches_stays_though_no_token_is_named_for_it() -> None:
    vocabulary = {
        word: number
        for number, word in enumerate(
            ["fill", "<unk>", *sorted({word for text in corpus(40) for word in text.split()})]
        )
    }
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _, _, trimmed = made(PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>"))
    assert trimmed.kept[0] == padding_id(trimmed.tokenizer) == 0
    assert len(trimmed.kept) < len(vocabulary)


def test_a_byte_vocabulary_has_nothing_to_lose() -> None:
    whole, trimmed, vocabulary = made(byte_tokenizer())
    assert vocabulary.kept == tuple(range(258))
    assert trimmed["train"]["input_ids"][:] == whole["train"]["input_ids"][:]
