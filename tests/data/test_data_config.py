"""The `data` section refuses what has no meaning, and says what to write instead."""

from __future__ import annotations

from typing import Any

import pytest
from data_samples import config
from pydantic import ValidationError

from layerdistill.core.errors import UserError
from layerdistill.data.config import DataConfig
from layerdistill.data.tasks import TASKS, get_task
from layerdistill.evaluate.config import DEFAULT_METRICS, TASK_METRICS
from layerdistill.models.tasks import TASK_CLASSES


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "token-classification"}, "Supported: sequence-classification, multi-label-classification"),
        ({"task": "regresion"}, "Did you mean 'regression'"),
        ({"text": None}, "data.text is missing"),
        ({"text": ["a", "b", "c"]}, "at most 2"),
        ({"text": ["a", "a"]}, "data.text names the column 'a' twice"),
        ({"text": "a", "label": "a"}, "data.text and data.label both name the column 'a'"),
        ({"task": "multi-label-classification", "label": ["b", "b"]}, "data.label names the column 'b' twice"),
        ({"task": "causal-lm", "text": ["a", "b"]}, "names 2 columns, but causal-lm reads one"),
        ({"label": ["x", "y"]}, "which only multi-label-classification reads"),
        ({"label_names": ["yes", "yes"]}, "a name occurs twice"),
        ({"label_names": ["yes"]}, "at least 2"),
        ({"max_length": 1}, "greater than or equal to 2"),
        ({"max_train_examples": 0}, "greater than or equal to 1"),
        ({"stride": 8}, "only for causal-lm with pack: true"),
        ({"task": "causal-lm", "stride": 8, "pack": False}, "only for causal-lm with pack: true"),
        ({"task": "causal-lm", "stride": 129}, "Give at most 128"),
        ({"padding": "left"}, "'longest' or 'max_length'"),
        ({"train": []}, "at least 1"),
        ({"columns": "text"}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_section_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(**changes)
    assert says in str(caught.value)


def test_two_problems_of_one_section_are_reported_together() -> None:
    with pytest.raises(ValidationError) as caught:
        config(text=None, label=["x", "y"])
    assert "data.text is missing" in str(caught.value)
    assert "data.label names several columns" in str(caught.value)


@pytest.mark.parametrize("task", TASKS)
def test_a_complete_section_reads_back_as_itself(task: str) -> None:
    section = config(task=task)
    assert DataConfig(**section.model_dump()) == section


def test_text_may_be_left_out_where_the_data_have_one_form() -> None:
    assert DataConfig(task="sequence-classification", train="installed-docs").text_columns == ("text",)
    assert DataConfig(task="causal-lm", train="corpus.txt").text_columns == ("text",)


def test_every_task_has_metrics_and_a_model_class() -> None:
    assert set(TASKS) == set(TASK_METRICS) == set(DEFAULT_METRICS)
    assert set(TASKS) <= set(TASK_CLASSES)
    for task, defaults in DEFAULT_METRICS.items():
        assert set(defaults) <= set(TASK_METRICS[task])


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"Supported: sequence-classification.*Did you mean 'causal-lm'"):
        get_task("casual-lm")
