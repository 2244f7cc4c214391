"""Run folders into one table over seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from layerdistill.core.errors import UserError
from layerdistill.report.runs import collect_rows, main


def write_run(folder: Path, method: str, seed: int, accuracy: float, **changes: object) -> None:
    run = folder / f"{method}-{seed}"
    run.mkdir(parents=True)
    recipe = {"method": {"name": method}, "seed": seed, "output": str(run), "data": {"train": "x"}, **changes}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cost = {"parameters": {"total": 10}, "latency_ms": {"1": 2.0}, "size_mb": 1.5}
    found = {
        "student": {"accuracy": accuracy},
        "teacher": {"accuracy": 0.9},
        "chance": {"accuracy": 0.5},
        "thrown_away_parameters": 77,
        "cost": {"student": cost, "teacher": {**cost, "parameters": {"total": 40}}},
    }
    (run / "evaluation.json").write_text(json.dumps(found))


def test_one_row_per_method_over_its_seeds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed, accuracy in ((1, 0.80), (2, 0.82), (3, 0.84)):
        write_run(tmp_path, "cka", seed, accuracy)
    write_run(tmp_path, "none", 1, 0.7)
    (tmp_path / "unfinished").mkdir()
    rows = collect_rows(tmp_path)
    assert [row.name for row in rows] == ["teacher", "none (1 seeds)", "cka (3 seeds)"]
    assert rows[2].seeds("accuracy") == [0.80, 0.82, 0.84]
    main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "0.8200 ± 0.0200" in printed
    cells = [cell.strip() for cell in printed.splitlines()[4].split("|")]
    assert cells[3:5] == ["91.1", "80.0"], "retained, and retained above chance: (0.82 - 0.5) / (0.9 - 0.5)"
    assert "77.0" in cells


def test_the_folder_says_more_than_the_method(tmp_path: Path) -> None:
    write_run(tmp_path, "kd", 3, 0.8)
    (tmp_path / "kd-3").rename(tmp_path / "kd-6blocks-3")
    write_run(tmp_path, "kd", 3, 0.7)
    assert [row.name for row in collect_rows(tmp_path)] == ["teacher", "kd (1 seeds)", "kd-6blocks (1 seeds)"]


def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "kd", 1, 0.8)
    write_run(tmp_path, "kd", 2, 0.8, data={"train": "y"})
    with pytest.raises(UserError, match="another data section"):
        collect_rows(tmp_path)


def test_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run"):
        collect_rows(tmp_path)


def changed(run: Path, **parts: object) -> None:
    """Write parts of a run's evaluation anew; None takes one away."""
    found = json.loads((run / "evaluation.json").read_text()) | parts
    (run / "evaluation.json").write_text(json.dumps({name: part for name, part in found.items() if part is not None}))


def test_runs_without_a_teacher_and_without_costs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(tmp_path, "none", 1, 0.7)
    changed(tmp_path / "none-1", teacher=None, cost={"student": {"parameters": {"total": 10}}})
    main([str(tmp_path)])
    assert "| none (1 seeds) | 0.7000" in capsys.readouterr().out
    changed(tmp_path / "none-1", teacher={"accuracy": 0.9}, cost=None)
    main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| teacher | 0.9000" in printed and "| none (1 seeds) | 0.7000" in printed


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["one", "two"]])
def test_wrong_input_is_one_message(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err
