"""The runs of one teacher ask it once for the test split, unless the recipe turns its cache off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from toy_recipe import toy_recipe

from layerdistill import measurement
from layerdistill.runner import run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Grows by the number of blocks of each model that is run over the test split."""
    monkeypatch.setenv("LAYERDISTILL_HOME", str(tmp_path / "home"))
    models: list[Any] = []
    predict = measurement.predict

    def counted(model: Any, *rest: Any) -> Any:
        models.append(model.config.num_hidden_layers)
        return predict(model, *rest)

    monkeypatch.setattr(measurement, "predict", counted)
    return models


def finished(folder: Path, output: str, method: str = "kd", **changes: Any) -> Any:
    recipe = toy_recipe(folder, method, output=str(folder / output))
    recipe["evaluation"] = {"cost": False, **changes.pop("evaluation", {})}
    recipe["teacher"] |= changes.pop("teacher", {})
    recipe |= changes
    (folder / f"{output}.yaml").write_text(yaml.safe_dump(recipe))
    return run(recipe, console=Console(quiet=True))


def test_the_teacher_is_asked_for_the_test_split_once(tmp_path: Path, asked: list[Any]) -> None:
    first = finished(tmp_path, "first", "kd")
    blocks = list(asked)
    assert sorted(blocks) == sorted([2, 4]), "student and teacher"
    second = finished(tmp_path, "second", "ild", seed=8)
    assert asked == [*blocks, 2], "the second run asks the student alone"
    assert second.teacher_metrics == first.teacher_metrics and first.teacher_metrics
    tables = [pq.read_table(tmp_path / name / "predictions-teacher.parquet") for name in ("first", "second")]
    assert tables[0].num_rows == 24 and tables[0].equals(tables[1])
    other = finished(tmp_path, "third", evaluation={"metrics": ["macro_f1"]})
    assert 4 not in asked[len(blocks) :], "another metric is computed from what was said"
    assert set(other.teacher_metrics) == {"macro_f1"}


def test_another_teacher_reader_or_batch_asks_anew(tmp_path: Path, asked: list[Any]) -> None:
    finished(tmp_path, "first")
    for number, changes in enumerate(
        (
            {"evaluation": {"batch_size": 3}},
            {"teacher": {"attn_implementation": "eager"}},
            {"data": {**toy_recipe(tmp_path)["data"], "padding": "max_length"}},
        )
    ):
        finished(tmp_path, f"other-{number}", **changes)
        assert asked.count(4) == number + 2, f"{changes}"
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    weights["classifier.bias"] += 0.5
    save_file(weights, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    finished(tmp_path, "moved")
    assert asked.count(4) == 5


def test_another_test_split_or_no_cache_asks_anew(tmp_path: Path, asked: list[Any]) -> None:
    finished(tmp_path, "first")
    finished(tmp_path, "off", teacher={"cache": "off"})
    assert asked.count(4) == 2, "with the cache off a run depends on nothing that was kept"
    file = tmp_path / "data" / "validation.jsonl"
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:-4]))
    finished(tmp_path, "fewer")
    assert asked.count(4) == 3
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["label"] = (rows[0]["label"] + 1) % 3
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished(tmp_path, "relabelled")
    assert asked.count(4) == 4
