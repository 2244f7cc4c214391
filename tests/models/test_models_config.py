"""The recipe's teacher and student sections refuse what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from layerdistill.models import StudentConfig, TeacherConfig


@pytest.mark.parametrize(
    "given",
    [
        {"num_blocks": 3},
        {"num_blocks": {"encoder": 3, "decoder": 1}},
        {"num_blocks": 3, "hidden_size": 192, "init": "truncate"},
        {"copy_map": [0, 4, 2]},
        {"model": "some/student", "dtype": "bfloat16", "trust_remote_code": True},
    ],
)
def test_students_that_make_sense(given: dict[str, Any]) -> None:
    student = StudentConfig.model_validate(given)
    assert all(getattr(student, key) == value for key, value in given.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "student is empty"),
        ({"model": "some/student", "num_blocks": 3}, r"a model \('some/student'\) and a shape \(num_blocks\)"),
        ({"num_blocks": 0}, "greater than 0"),
        ({"num_blocks": {"encodr": 3}}, "encodr"),
        ({"num_blocks": 3, "copy_map": "foward"}, "Did you mean 'forward'"),
        ({"num_blocks": 3, "init": "cut"}, "truncate"),
        ({"blocks": 3}, "blocks"),
    ],
)
def test_students_that_do_not(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudentConfig.model_validate(given)


def test_teacher() -> None:
    teacher = TeacherConfig.model_validate({"model": "package:x/model", "finetune": {"num_train_epochs": 3}})
    assert (teacher.dtype, teacher.trust_remote_code) == ("float32", False)
    with pytest.raises(ValidationError, match="dtype"):
        TeacherConfig.model_validate({"model": "x", "dtype": "int8"})
    with pytest.raises(ValidationError, match="model"):
        TeacherConfig.model_validate({})
