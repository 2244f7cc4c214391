"""What the evaluation at the end could not do is said before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from toy_recipe import toy_recipe

from layerdistill.core.errors import UserError
from layerdistill.runner import run


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"metrics": ["f1"]}, "metric 'f1' is the F1 of label 1 among two classes, but there are 3 classes"),
        ({"latency_seq": 129}, r"evaluation\.latency_seq is 129, but the models have 128 positions"),
        ({"metrics": ["f1"], "latency_seq": 129}, r"(?s)macro_f1.*latency_seq"),
    ],
)
def test_it_is_refused_before_the_training(section: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        run(toy_recipe(tmp_path, "kd", evaluation=section), console=Console(quiet=True))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_length_that_nobody_measures_is_no_problem(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "none", evaluation={"latency_seq": 500, "cost": False, "metrics": ["accuracy"]})
    assert run(recipe, console=Console(quiet=True)).metrics
