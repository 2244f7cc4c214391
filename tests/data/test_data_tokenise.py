"""Texts become inputs of the right length with the right labels; what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
from data_samples import WORDS, bert_tokenizer, byte_tokenizer, config
from datasets import Dataset
from tokenizers import normalizers

from layerdistill.core.errors import UserError
from layerdistill.data.fingerprint import fingerprint_dataset
from layerdistill.data.labels import label_space
from layerdistill.data.load import load_splits
from layerdistill.data.tokenise import tokenise

CLS, SEP = 2, 3
ROWS = [
    {"text": "good film", "other": "bad story", "label": "pos"},
    {"text": " ", "other": "bad", "label": "pos"},
    {"text": "a very very very dull film , he said .", "other": "dull", "label": "neg"},
]


def inputs(rows: Any, tokenizer: Any, max_positions: int | None = None, **changes: Any) -> dict[str, Dataset]:
    section = config(**changes)
    splits = load_splits(section, memory=rows if isinstance(rows, dict) else {"train": rows})
    return tokenise(splits, section, tokenizer, label_space(splits, section), max_positions)


def ids(words: str) -> list[int]:
    return [WORDS.index(word) + 5 for word in words.split()]


def test_single_texts_are_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    train = inputs(ROWS, bert_tokenizer(), max_length=6, drop_empty=True)["train"]
    assert train["input_ids"][:] == [[CLS, *ids("good film"), SEP], [CLS, *ids("a very very very"), SEP]]
    assert train["attention_mask"][:] == [[1] * 4, [1] * 6]
    assert train["labels"][:] == [1, 0]
    assert train["example_id"][:] == [0, 2]
    assert train["length"][:] == [4, 6]
    assert "1 of 2 examples are longer than max_length=6" in caplog.text


def test_pairs_are_marked_and_the_longer_text_is_cut() -> None:
    train = inputs(ROWS[::2], bert_tokenizer(), text=["text", "other"], max_length=8)["train"]
    assert train["input_ids"][0] == [CLS, *ids("good film"), SEP, *ids("bad story"), SEP]
    assert train["token_type_ids"][0] == [0, 0, 0, 0, 1, 1, 1]
    assert train["input_ids"][1] == [CLS, *ids("a very very very"), SEP, *ids("dull"), SEP]


def test_multi_label_becomes_a_float_vector_and_regression_a_float() -> None:
    rows = [{"text": "good", "label": [0, 2]}, {"text": "bad", "label": [1]}]
    train = inputs(rows, bert_tokenizer(), task="multi-label-classification")["train"]
    assert train["labels"][:] == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    rows = [{"text": "good", "label": 2}, {"text": "bad", "label": 3}]
    train = inputs(rows, bert_tokenizer(), task="regression")["train"]
    assert train["labels"][:] == [2.0, 3.0]
    assert train.features["labels"].dtype == "float32"


def test_the_same_input_gives_the_same_bytes() -> None:
    rows = [{"text": f"good film {number}", "label": number % 2} for number in range(2500)]
    first, second = (inputs(rows, bert_tokenizer())["train"] for _ in range(2))
    assert fingerprint_dataset(first) == fingerprint_dataset(second)
    assert fingerprint_dataset(first) != fingerprint_dataset(first.select(range(2499)))
    changed = [*rows[:-1], {"text": "good film", "label": 1}]
    assert fingerprint_dataset(inputs(changed, bert_tokenizer())["train"]) != fingerprint_dataset(first)


def test_a_fingerprint_depends_on_content_and_not_on_storage() -> None:
    rows = [{"text": "good " * number, "label": [1] * (number % 3)} for number in range(50)]
    whole = Dataset.from_list(rows)
    part = Dataset.from_list(rows[10:20])
    assert fingerprint_dataset(whole.select(range(10, 20))) == fingerprint_dataset(part)
    assert fingerprint_dataset(whole.select([19, 10])) == fingerprint_dataset(part.select([9, 0]))
    assert fingerprint_dataset(whole.select([10, 19])) != fingerprint_dataset(part.select([9, 0]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_length": 65, "max_positions": 64}, "max_length is 65, but the models have positions for 64 tokens"),
        ({"max_length": 2}, "2 special tokens are added to every example, which leaves no room for text"),
        ({"max_length": 4, "text": ["text", "other"]}, "Set it to at least 5"),
    ],
)
def test_an_impossible_length_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        inputs(ROWS[::2], bert_tokenizer(), **options)


def test_the_tokenizers_limit_holds_where_no_model_is_known() -> None:
    tokenizer = bert_tokenizer()
    tokenizer.model_max_length = 32
    with pytest.raises(UserError, match="the tokenizer allows 32 tokens"):
        inputs(ROWS[::2], tokenizer, max_length=33)
    assert len(inputs(ROWS[::2], tokenizer, max_length=33, max_positions=33)["train"]) == 2


def test_a_text_without_any_token_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("#", "")
    rows = [{"text": "good", "label": 0}, {"text": "##", "label": 1}]
    with pytest.raises(UserError, match="makes no token of the text in row 1"):
        inputs(rows, tokenizer)


def test_a_language_model_trains_on_full_blocks_and_is_scored_on_all_of_the_rest() -> None:
    tokenizer = byte_tokenizer()
    documents = [{"text": "abcde"}, {"text": ""}, {"text": "fgh"}, {"text": "ijklm"}]
    memory = {"train": documents, "validation": documents}
    splits = inputs(memory, tokenizer, task="causal-lm", max_length=6)
    end = tokenizer.eos_token_id
    stream = [*tokenizer("abcde")["input_ids"], end, *tokenizer("fgh")["input_ids"], end]
    stream += [*tokenizer("ijklm")["input_ids"], end]
    assert splits["train"]["input_ids"][:] == [stream[:6], stream[6:12]]
    assert splits["train"]["labels"][:] == splits["train"]["input_ids"][:]
    assert splits["validation"]["input_ids"][:] == [stream[:6], stream[6:12], stream[12:]]
    assert splits["validation"]["length"][:] == [6, 6, 4]
    limited = inputs(memory, tokenizer, task="causal-lm", max_length=6, max_train_examples=1, max_eval_examples=2)
    assert {split: len(data) for split, data in limited.items()} == {"train": 1, "validation": 2}


def test_overlapping_windows_score_only_what_is_new() -> None:
    rows = [{"text": "abcdefghij"}]
    section = {"task": "causal-lm", "separator": "none", "max_length": 6, "stride": 2}
    validation = inputs({"train": rows, "validation": rows}, byte_tokenizer(), **section)["validation"]
    assert [byte_tokenizer().decode(row) for row in validation["input_ids"]] == ["abcdef", "cdefgh", "efghij"]
    assert [row.count(-100) for row in validation["labels"]] == [0, 4, 4]


def test_without_packing_every_document_is_an_example(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "abc"}, {"text": ""}, {"text": "abcdefgh"}]
    train = inputs(rows, byte_tokenizer(), task="causal-lm", pack=False, max_length=6)["train"]
    assert [byte_tokenizer().decode(row) for row in train["input_ids"]] == ["abc<end>", "abcdef"]
    assert train["example_id"][:] == [0, 2]
    assert "1 have fewer than two tokens and were left out, 1 are longer" in caplog.text


@pytest.mark.parametrize(
    ("memory", "changes", "tokenizer", "says"),
    [
        ({"train": [{"text": "abc"}]}, {}, byte_tokenizer(), "data.train has 4 tokens in all, but 128 are needed"),
        (
            {"train": [{"text": "abcdef"}], "test": [{"text": ""}]},
            {"max_length": 4},
            byte_tokenizer(),
            "data.test has 0 tokens in all, but 2 are needed",
        ),
        ({"train": [{"text": ""}]}, {"pack": False}, byte_tokenizer(), "no document has two tokens or more"),
        ({"train": [{"text": "good"}]}, {}, bert_tokenizer(), "has no end-of-text token"),
    ],
)
def test_too_little_text_is_refused(memory: Any, changes: dict[str, Any], tokenizer: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        inputs(memory, tokenizer, task="causal-lm", **changes)
