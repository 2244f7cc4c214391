"""Rows set aside for choosing: not trained on, not reported, drawn by the seed, refused where that cannot be."""

from __future__ import annotations

import pytest
from datasets import Dataset
from pydantic import ValidationError

from layerdistill.core.errors import UserError
from layerdistill.data import CALIBRATION, CalibrationConfig, set_aside


def numbered(first: int, count: int) -> Dataset:
    """Rows of two tokens, of which the first is the row's number."""
    return Dataset.from_list(
        [{"input_ids": [number, 9], "labels": number % 2} for number in range(first, first + count)]
    )


def numbers(rows: Dataset) -> list[int]:
    return [ids[0] for ids in rows["input_ids"]]


def test_training_rows_are_shared_out_without_a_rest_and_in_their_order() -> None:
    given = {"train": numbered(0, 40), "validation": numbered(100, 10)}
    found = set_aside(given, CalibrationConfig(examples=15), seed=3)
    assert set(found) == {"train", "validation", CALIBRATION}
    chosen, left = numbers(found[CALIBRATION]), numbers(found["train"])
    assert (len(chosen), len(left)) == (15, 25)
    assert sorted(chosen + left) == list(range(40)), "each row is in one of the two"
    assert chosen == sorted(chosen) and left == sorted(left)
    assert chosen != list(range(15)), "not the first rows: files are often sorted"
    assert found["validation"] is given["validation"]
    assert set(given) == {"train", "validation"} and len(given["train"]) == 40, "what was given is left alone"
    assert found[CALIBRATION].column_names == given["train"].column_names


def test_the_seed_alone_decides_which_rows() -> None:
    given = {"train": numbered(0, 40)}
    config = CalibrationConfig(examples=10)
    draws = [numbers(set_aside(given, config, seed)[CALIBRATION]) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_validation_rows_serve_where_another_split_is_reported() -> None:
    given = {"train": numbered(0, 5), "validation": numbered(100, 8), "test": numbered(200, 4)}
    found = set_aside(given, CalibrationConfig(split="validation", examples=50), seed=0)
    assert numbers(found[CALIBRATION]) == list(range(100, 108)), "all there are, where more are asked for"
    assert numbers(found["train"]) == list(range(5)), "nothing is taken from training"
    assert numbers(found["validation"]) == list(range(100, 108))


def test_the_reported_split_is_refused() -> None:
    given = {"train": numbered(0, 5), "validation": numbered(100, 8)}
    with pytest.raises(UserError, match=r"'validation', which is the split that is reported.*data\.test"):
        set_aside(given, CalibrationConfig(split="validation"), seed=0)
    with pytest.raises(UserError, match=r"'validation', but the recipe has no data\.validation"):
        set_aside({"train": numbered(0, 5), "test": numbered(9, 2)}, CalibrationConfig(split="validation"), seed=0)


def test_something_must_be_left_to_train_on() -> None:
    for examples in (5, 6):
        with pytest.raises(UserError, match=f"examples is {examples}, but there are only 5 training rows"):
            set_aside({"train": numbered(0, 5)}, CalibrationConfig(examples=examples), seed=0)
    assert len(set_aside({"train": numbered(0, 5)}, CalibrationConfig(examples=4), seed=0)["train"]) == 1


@pytest.mark.parametrize("reported", ["validation", "test"])
def test_a_few_reported_rows_are_left_out_and_not_trained_on_either(reported: str) -> None:
    config = CalibrationConfig(examples=20)
    drawn = numbers(set_aside({"train": numbered(0, 60)}, config, seed=4)[CALIBRATION])
    same = Dataset.from_list([{"input_ids": [number, 9], "labels": 5} for number in drawn[:2]])
    found = set_aside({"train": numbered(0, 60), reported: same}, config, seed=4)
    assert numbers(found[CALIBRATION]) == drawn[2:], "a row is known by its tokens, whatever its label"
    assert set(numbers(found["train"])) == set(range(60)) - set(drawn)


def test_more_than_a_tenth_of_reported_rows_is_refused() -> None:
    config = CalibrationConfig(examples=20)
    drawn = numbers(set_aside({"train": numbered(0, 60)}, config, seed=4)[CALIBRATION])
    same = Dataset.from_list([{"input_ids": [number, 9], "labels": 0} for number in drawn[:3]])
    with pytest.raises(UserError, match=r"3 of 20 rows drawn from data\.train also stand in data\.validation"):
        set_aside({"train": numbered(0, 60), "validation": same}, config, seed=4)


def test_where_a_test_split_is_reported_validation_rows_may_be_the_training_rows() -> None:
    given = {"train": numbered(0, 20), "validation": numbered(0, 20), "test": numbered(50, 5)}
    assert len(set_aside(given, CalibrationConfig(examples=5), seed=0)[CALIBRATION]) == 5


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"examples": 0}, {"rows": 3}])
def test_the_section_is_checked(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        CalibrationConfig(**wrong)
