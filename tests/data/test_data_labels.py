"""Labels of every form end in the one form of their task; anything doubtful is refused."""

from __future__ import annotations

from typing import Any

import pytest
from data_samples import config
from datasets import ClassLabel, Dataset, Features, List, Value

from layerdistill.core.errors import UserError
from layerdistill.data.labels import LabelSpace, label_space
from layerdistill.data.load import load_splits


def rows(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"film {number}", "label": label} for number, label in enumerate(labels)]


def read(train: Any, validation: Any = None, **changes: Any) -> tuple[list[Any], list[Any], LabelSpace]:
    """Labels of train and of validation, and the label space."""
    memory = {"train": train, **({} if validation is None else {"validation": validation})}
    section = config(**changes)
    splits = load_splits(section, memory=memory)
    found = splits["validation"]["label"][:] if validation is not None else []
    return splits["train"]["label"][:], found, label_space(splits, section)


def with_names(names: list[str], *labels: int) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": ["film"] * len(labels), "label": list(labels)}, features=features)


def test_words_get_ids_in_sorted_order() -> None:
    train, validation, space = read(rows("no", "yes", "maybe"), rows("yes", "maybe"))
    assert (train, validation) == ([1, 2, 0], [2, 0])
    assert space == LabelSpace(3, ("maybe", "no", "yes"), "single_label_classification")


def test_label_names_decide_the_order() -> None:
    train, _, space = read(rows("no", "yes"), label_names=["yes", "no", "never seen"])
    assert train == [1, 0]
    assert space.names == ("yes", "no", "never seen")
    assert read(rows(0, 1, 1), label_names=["negative", "positive"])[2].names == ("negative", "positive")


def test_whole_numbers_and_booleans_are_ids() -> None:
    assert read(rows(2, 0, 1))[2] == LabelSpace(3, ("LABEL_0", "LABEL_1", "LABEL_2"), "single_label_classification")
    assert read(rows(True, False))[0] == [1, 0]


def test_stored_names_win_and_are_matched_by_name() -> None:
    train, validation, space = read(with_names(["b", "a", "c"], 0, 1), with_names(["a", "c"], 0, 1))
    assert space.names == ("b", "a", "c")
    assert (train, validation) == ([0, 1], [1, 2])
    assert read(with_names(["b", "a"], 0, 1), rows(1, 0))[1] == [1, 0]


MULTI = [[0, 2], [], [1], [2, 1]]


@pytest.mark.parametrize(
    "train",
    [
        rows(*MULTI),
        rows([1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 1, 1]),
        rows([1.0, 0.0, 1.0], [0.0] * 3, [0.0, 1.0, 0.0], [0.0, 1.0, 1.0]),
        rows(["a", "c"], [], ["b"], ["c", "b"]),
        Dataset.from_list(
            rows(*MULTI), features=Features({"text": Value("string"), "label": List(ClassLabel(names=["a", "b", "c"]))})
        ),
    ],
    ids=["ids", "vectors", "float vectors", "words", "stored names"],
)
def test_multi_label_forms_agree(train: Any) -> None:
    found, _, space = read(train, task="multi-label-classification")
    assert found == [[0, 2], [], [1], [1, 2]]
    assert (space.num_labels, space.problem_type) == (3, "multi_label_classification")


def test_several_columns_are_named_after_themselves() -> None:
    train = [{"text": "film", "rude": 1, "loud": 0}, {"text": "film", "rude": 1, "loud": 1}]
    found, _, space = read(train, task="multi-label-classification", label=["rude", "loud"])
    assert found == [[0], [0, 1]]
    assert space.names == ("rude", "loud")


def test_regression_takes_any_finite_number() -> None:
    train, _, space = read(rows(1.5, -2.0, 0.0), task="regression")
    assert train == [1.5, -2.0, 0.0]
    assert space == LabelSpace(1, ("label",), "regression")


def test_language_models_have_no_labels() -> None:
    assert label_space(load_splits(config(task="causal-lm"), memory={"train": rows(0)}), config(task="causal-lm")) == (
        LabelSpace(0, (), None)
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("train", "validation", "changes", "says"),
    [
        (rows(1, 2, 3), None, {}, "the training labels are 1, 2, 3, but class ids must be 0, 1, ... without a gap"),
        (rows(0, 2, 2), None, {}, "the training labels are 0, 2"),
        (rows(0, 1, None), None, {}, "has no label in row 2"),
        (rows(0.0, NAN, 1.0), None, {}, "has no label in row 1"),
        (rows("a", "", "b"), None, {}, "has no label in row 1"),
        (rows("a", "b"), rows(" "), {}, "has no label in row 0"),
        (rows(1.0, 0.0, 1.5), None, {}, "holds 1.5 in row 2"),
        (rows("4.8", "high", "3"), None, {"task": "regression"}, "holds 'high' in row 1, but regression"),
        (rows("a", "b"), rows("x" * 60), {}, f"label {'x' * 37}... in row 0"),
        (rows(0.5, 1.5), None, {}, "holds 0.5 in row 0, but a class is a whole number from 0 or a word"),
        (rows([0], [1]), None, {}, "data.task: multi-label-classification"),
        (rows(1, 1, 1), None, {}, "class ids must be 0, 1"),
        (rows("a", "a"), None, {}, "every training row has the same label ('a')"),
        (rows(0, 1), rows(0, 2, 2), {}, "data.validation: label 2 in 2 rows (the first: 1, 2)"),
        (rows("a", "b"), rows("a", "c"), {}, "label c in row 1 of column 'label' is not among the classes a, b"),
        (rows("a", "b"), rows(0, 1), {}, "label 0, 1 in 2 rows"),
        (rows("a", "b"), None, {"label_names": ["a", "c"]}, "not among the classes a, c (data.label_names)"),
        (rows(0, 1), rows(-1, -1), {}, "Labels of -1 are usually hidden ones"),
        (with_names(["a", "b"], 0, 1), with_names(["a", "b"], -1), {}, "Labels of -1"),
        (
            rows(0, 1),
            None,
            {"task": "multi-label-classification"},
            "holds 0 in row 0, but multi-label data need a list",
        ),
        (rows([], []), None, {"task": "multi-label-classification"}, "no training row has any label"),
        (rows([0, 1], [0.5, 1]), None, {"task": "multi-label-classification"}, "holds [0.0, 1.0] in row 0"),
        (
            rows([1, 0], [0, 0]),
            rows([1, 0, 0]),
            {"task": "multi-label-classification"},
            "the label in row 0 has 3 entries, but there are 2 classes",
        ),
        (rows([1, 0], [0, 0]), rows([2, 0]), {"task": "multi-label-classification"}, "holds 2, but a 0/1 label"),
        (rows("high", "low"), None, {"task": "regression"}, "holds 'high' in row 0, but regression needs numbers"),
        (
            with_names(["a", "b"], 0, 1),
            None,
            {"task": "regression"},
            "holds class labels, but regression needs numbers",
        ),
        (rows(1.0, float("inf")), None, {"task": "regression"}, "is infinite in row 1"),
        (rows(1.0, NAN), None, {"task": "regression"}, "has no label in row 1"),
    ],
)
def test_wrong_labels_are_refused(train: Any, validation: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        read(train, validation, **changes)
    assert says in str(caught.value)


def test_classes_that_look_like_an_accident_are_told(caplog: pytest.LogCaptureFixture) -> None:
    load_splits(config(), memory={"train": rows("pos", "Pos", "neg", "pos ")})
    assert "The labels 'Pos', 'pos', 'pos ' are different classes." in caplog.text
    assert "Check data.label" not in caplog.text, "four rows say nothing"
    load_splits(config(), memory={"train": rows(*(f"text {number}" for number in range(20)))})
    assert "20 classes in 20 rows. Check data.label." in caplog.text


def test_a_row_with_a_blank_word_for_a_label_can_be_dropped() -> None:
    splits = load_splits(config(drop_empty=True), memory={"train": rows("a", "", "b")})
    assert splits["train"]["example_id"] == [0, 2]
    assert splits["train"].features["label"].names == ["a", "b"]
