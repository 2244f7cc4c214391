"""Every source gives the same rows, and every broken source one message that says what to do."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from data_samples import config, write_rows
from datasets import Dataset

from layerdistill.core.errors import UserError
from layerdistill.data.load import load_splits, subset

ROWS = [
    {"text": "good film", "label": 1},
    {"text": "1999", "label": 0},
    {"text": "NA", "label": 1},
    {"text": "the story , very dull", "label": 0},
]
TEXTS = [row["text"] for row in ROWS]
LABELS = [row["label"] for row in ROWS]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("local data must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows_and_writes_nothing(suffix: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"some.{suffix}", ROWS)
    train = load_splits(config(train=str(path)))["train"]
    assert train["text"][:] == TEXTS
    assert train["label"][:] == LABELS
    assert train["example_id"][:] == [0, 1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_csv_keeps_quoted_commas_and_lines_and_tsv_keeps_unpaired_quotes(tmp_path: Path) -> None:
    rows = [{"text": 'he said , "good\nfilm"', "label": 0}, {"text": "bad", "label": 1}]
    csv_file = write_rows(tmp_path / "a.csv", rows)
    assert load_splits(config(train=str(csv_file)))["train"]["text"][:] == [rows[0]["text"], "bad"]
    rows = [{"text": '"good', "label": 0}, {"text": "bad", "label": 1}]
    tsv_file = write_rows(tmp_path / "a.tsv", rows)
    assert load_splits(config(train=str(tsv_file)))["train"]["text"][:] == ['"good', "bad"]


def test_json_lines_in_a_json_file_and_keys_that_come_late(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"text": "good", "label": 0}\n\n{"label": 1, "more": 3, "text": "bad"}\n')
    assert load_splits(config(train=str(path)))["train"]["text"][:] == ["good", "bad"]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    section = config(task="causal-lm", train=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    train = load_splits(section)["train"]
    assert train["text"][:] == ["one\n\ntwo\n", "three"]
    assert "label" not in train.column_names


def test_files_of_a_list_follow_each_other(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "x.csv", ROWS[:2])
    second = write_rows(tmp_path / "y.jsonl", ROWS[2:])
    train = load_splits(config(train=[str(first), str(second)]))["train"]
    assert train["text"][:] == TEXTS
    assert train["example_id"][:] == [0, 1, 2, 3]


def test_a_folder_brings_its_splits_and_given_ones_win(tmp_path: Path) -> None:
    write_rows(tmp_path / "train-00000-of-00002.parquet", ROWS[:2])
    write_rows(tmp_path / "train-00001-of-00002.parquet", ROWS[2:])
    write_rows(tmp_path / "dev.csv", ROWS[:2])
    write_rows(tmp_path / "training_notes.csv", [{"text": "not data", "label": 0}])
    splits = load_splits(config(train=str(tmp_path)))
    assert {split: len(data) for split, data in splits.items()} == {"train": 4, "validation": 2}
    other = write_rows(tmp_path / "elsewhere" / "x.csv", ROWS[:3])
    assert len(load_splits(config(train=str(tmp_path), validation=str(other)))["validation"]) == 3


def test_a_path_is_looked_for_in_the_recipes_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    write_rows(here / "a.csv", ROWS[:2])
    write_rows(here / "b.csv", ROWS[:3])
    write_rows(tmp_path / "recipes" / "a.csv", ROWS)
    monkeypatch.chdir(here)
    assert len(load_splits(config(train="a.csv"), base=tmp_path / "recipes")["train"]) == 4
    assert len(load_splits(config(train="b.csv"), base=tmp_path / "recipes")["train"]) == 3
    assert len(load_splits(config(train="a.csv"))["train"]) == 2


def test_data_in_memory_take_the_place_of_sources() -> None:
    dataset = Dataset.from_list(ROWS).with_format("torch").select([3, 0, 1])
    splits = load_splits(config(), memory={"train": dataset, "validation": ROWS[:1]})
    assert splits["train"]["text"][:] == [TEXTS[3], TEXTS[0], TEXTS[1]]
    assert splits["validation"]["label"][:] == [1]


def test_pairs_and_blank_rows_that_are_dropped_keep_their_numbers(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"a": "good", "b": "bad", "label": 0},
        {"a": " ", "b": "bad", "label": 1},
        {"a": "good", "b": "film", "label": None},
        {"a": "the", "b": "story", "label": 1},
    ]
    section = config(text=["a", "b"], drop_empty=True)
    train = load_splits(section, memory={"train": rows})["train"]
    assert train["example_id"][:] == [0, 3]
    assert train["text_pair"][:] == ["bad", "story"]
    assert train["label"][:] == [0, 1]
    assert "2 of 4 rows dropped" in caplog.text


def test_a_language_model_keeps_blank_rows() -> None:
    rows = [{"text": ""}, {"text": " = Title = \n"}, {"text": ""}]
    train = load_splits(config(task="causal-lm"), memory={"train": rows})["train"]
    assert train["text"][:] == ["", " = Title = \n", ""]


def test_a_subset_is_always_the_same_nested_and_in_order() -> None:
    rows = [{"text": f"film {number}", "label": int(number >= 50)} for number in range(100)]
    memory = {"train": rows, "validation": rows}
    ten = load_splits(config(max_train_examples=10, max_eval_examples=7), memory=memory)
    ids = ten["train"]["example_id"][:]
    assert ids == sorted(ids)
    assert len(ids) == 10
    assert len(ten["validation"]) == 7
    assert set(ids) <= set(load_splits(config(max_train_examples=30), memory=memory)["train"]["example_id"][:])
    assert ten["train"]["text"][:] == [f"film {number}" for number in ids]
    assert min(ids) < 50 <= max(ids)
    assert subset(5, 9, "train") == [0, 1, 2, 3, 4]


BAD_TEXT = [{"text": "good", "label": 0}, {"text": None, "label": 1}, {"text": " \n", "label": 1}]


@pytest.mark.parametrize(
    ("rows", "changes", "says"),
    [
        (ROWS, {"text": "texts"}, "has no column 'texts' (data.text). It has: text, label. Did you mean 'text'?"),
        (ROWS, {"label": "target"}, "has no column 'target' (data.label). It has: text, label."),
        (ROWS, {"text": "label", "label": "text"}, "column 'label' (data.text) holds int64, not text"),
        (BAD_TEXT, {}, "column 'text' has no text in 2 rows (the first: 1, 2). Fill them in, or drop"),
        (BAD_TEXT[1:], {"drop_empty": True}, "data.train has no usable row"),
        ([], {}, "data.train (in-memory) has no rows"),
        ("some text", {}, "the train data are a str, but must be a datasets.Dataset or a list of dicts"),
        (["a", "b"], {}, "the train data: row 0 is 'a', but every row must be an object"),
        ([{"text": "a", "label": 0}, {"text": 3, "label": 1}], {}, "holds values of different types"),
        ([{"text": None}, {"text": "a"}], {"task": "causal-lm"}, "has no text in row 0"),
    ],
)
def test_wrong_rows_are_refused(rows: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_splits(config(**changes), memory={"train": rows})
    assert says in str(caught.value)


def test_every_split_is_checked_and_reported_at_once(tmp_path: Path) -> None:
    section = config(train=str(tmp_path / "no.csv"), validation="nothing/at/all", test=["not_there.jsonl"])
    with pytest.raises(UserError) as caught:
        load_splits(section, base=tmp_path)
    assert len(caught.value.problems) == 3
    assert str(tmp_path / "no.csv") in caught.value.problems[0]
    assert str(tmp_path / "nothing/at/all") in caught.value.problems[1]
    assert str(Path.cwd() / "nothing/at/all") in caught.value.problems[1]
    assert "there is no file 'not_there.jsonl'" in caught.value.problems[2]


def test_a_missing_hub_id_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_splits(config(train="no-such-owner/no-such-data:default:train"))
    assert str(tmp_path / "no-such-owner") in str(caught.value)
    assert "hub data set 'no-such-owner/no-such-data' (config default, split train)" in str(caught.value)
    with pytest.raises(UserError, match="Did you mean 'installed-docs'"):
        load_splits(config(train="installed_docs"))


def test_a_split_that_was_not_handed_over_or_does_not_exist() -> None:
    with pytest.raises(UserError, match="no train data were handed over"):
        load_splits(config())
    with pytest.raises(UserError, match="'dev', but must be one of: train, validation, test"):
        load_splits(config(), memory={"train": ROWS, "dev": ROWS})


def test_a_folder_without_the_split_lists_what_is_there(tmp_path: Path) -> None:
    write_rows(tmp_path / "data.csv", ROWS)
    with pytest.raises(UserError, match=r"holds no train file: looked for train, training.*There: data.csv"):
        load_splits(config(train=str(tmp_path)))


def write_broken(path: Path) -> Path:
    """A file that is not what its suffix says."""
    whole = path.with_name("whole.parquet")
    pyarrow.parquet.write_table(pa.table({"text": ["a"] * 100, "label": [0] * 100}), whole)
    content = {
        "cut.parquet": whole.read_bytes()[:200],
        "empty.csv": b"",
        "ragged.csv": b"text,label\na,1\nb,1,2\n",
        "twice.csv": b"text,text,label\na,b,1\n",
        "latin.jsonl": b'{"text": "caf\xe9", "label": 1}\n',
        "latin.csv": b"text,label\ncaf\xe9,1\n",
        "semicolons.csv": b"text;label\na, b;1\n",
        "line.jsonl": b'{"text": "a", "label": 1}\n{"text": \n',
        "list.json": b"[1, 2]",
        "data.xlsx": b"PK",
    }
    path.write_bytes(content[path.name])
    return path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cut.parquet", "cannot be read as parquet"),
        ("empty.csv", "cannot be read as csv"),
        ("ragged.csv", "Expected 2 columns, got 3"),
        ("twice.csv", "more than one column named 'text'"),
        ("latin.jsonl", "cannot be read as jsonl"),
        ("latin.jsonl", "Save it as UTF-8."),
        ("latin.csv", "Save it as UTF-8."),
        ("semicolons.csv", "Columns are separated by commas in csv"),
        ("line.jsonl", "line 2: not valid JSON"),
        ("list.json", "row 0 is 1, but every row must be an object"),
        ("data.xlsx", "its name must end in .csv, .tsv, .json, .jsonl, .parquet, .txt"),
    ],
)
def test_a_broken_file_is_named(name: str, says: str, tmp_path: Path) -> None:
    path = write_broken(tmp_path / name)
    with pytest.raises(UserError) as caught:
        load_splits(config(train=str(path)))
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_files_whose_columns_do_not_go_together(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "x.jsonl", [{"text": "a", "label": 0}])
    second = write_rows(tmp_path / "y.jsonl", [{"text": "a", "label": [1]}])
    with pytest.raises(UserError, match=r"the columns of .*x.jsonl, .*y.jsonl cannot be used"):
        load_splits(config(train=[str(first), str(second)]))


PAIRS = [{"a": f"{number:05}", "b": "same", "label": number % 2} for number in range(20)]


@pytest.mark.parametrize(("shared", "warned"), [(0, None), (1, None), (2, "10 %"), (20, "100 %")])
def test_a_split_of_texts_that_are_trained_on_is_told(
    shared: int, warned: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    splits = {"train": PAIRS, "validation": PAIRS[:shared] + [row | {"b": "none"} for row in PAIRS[shared:]]}
    load_splits(config(text=["a", "b"]), memory=splits)
    said = f"data.validation: {shared} of 20 texts ({warned} of the characters) are in data.train too"
    assert said in caplog.text if warned else not caplog.text


def test_blank_rows_and_headings_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": text} for text in ("", " = Title = \n", "", "")]
    splits = {"train": [*rows, {"text": "What is learnt."}], "validation": [*rows, {"text": 40 * "What is asked. "}]}
    load_splits(config(task="causal-lm"), memory=splits)
    assert not caplog.text
