"""What runs keep for later ones is listed with its last use, and deleted when it is named or old."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from toy_recipe import toy_recipe

from layerdistill import cli
from layerdistill.core.errors import UserError
from layerdistill.core.processes import file_lock
from layerdistill.kept import delete_kept, list_kept
from layerdistill.runner import run

DAY = 86_400


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a fine-tuned teacher, its cache and its predictions."""
    monkeypatch.setenv("LAYERDISTILL_HOME", str(tmp_path / "home"))
    recipe = toy_recipe(tmp_path, "kd")
    recipe["teacher"] |= {"finetune": {"max_steps": 2}, "cache": "fill"}
    run(recipe, console=Console(quiet=True))
    return tmp_path / "home"


def age(folder: Path, days: float) -> None:
    """Make everything below a folder so old."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - days * DAY,) * 2)


def called(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command line and return its status."""
    monkeypatch.setattr(sys, "argv", ["layerdistill", "kept", *words])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_everything_that_a_run_kept_is_listed(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {entry.kind: entry for entry in list_kept()}
    assert set(found) == {"fine-tuned teacher", "teacher cache", "predictions"}
    teacher = found["fine-tuned teacher"]
    assert teacher.about.endswith("teacher")
    assert teacher.bytes == sum(path.stat().st_size for path in (home / "teachers" / teacher.name).rglob("*"))
    assert called(monkeypatch) == 0
    said = capsys.readouterr().out
    assert all(entry.name in said for entry in found.values()), "whole, because --delete wants them"


def test_what_is_named_is_deleted_and_a_wrong_name_deletes_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = next(entry for entry in list_kept() if entry.kind == "teacher cache")
    assert called(monkeypatch, "--delete", cache.name, "--delete", f"{cache.name[:-1]}x") == 2
    assert f"Did you mean '{cache.name}'?" in capsys.readouterr().err.replace("\n", " ")
    assert (home / "cache" / cache.name).exists()
    assert called(monkeypatch, "--delete", cache.name) == 0
    assert not (home / "cache" / cache.name).exists()
    assert {entry.kind for entry in list_kept()} == {"fine-tuned teacher", "predictions"}


def test_what_a_run_uses_again_is_not_old(home: Path, tmp_path: Path) -> None:
    before = {entry.name for entry in list_kept()}
    age(home, days=40)
    recipe = toy_recipe(tmp_path, "kd", output=str(tmp_path / "again"))
    recipe["teacher"] |= {"finetune": {"max_steps": 2}, "cache": "fill"}
    run(recipe, console=Console(quiet=True))
    assert delete_kept(unused_days=30) == []
    assert {entry.name for entry in list_kept()} == before
    age(home / "cache", days=31)
    assert [entry.kind for entry in delete_kept(unused_days=30)] == ["teacher cache"]
    age(home, days=31)
    assert len(delete_kept(unused_days=30)) == 2
    assert list_kept() == []
    assert not [path for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_teacher_that_is_being_made_is_refused(home: Path) -> None:
    teacher = next(entry for entry in list_kept() if entry.kind == "fine-tuned teacher")
    lock = home / "teachers" / f"{teacher.name}.lock"
    with file_lock(lock, "the test"), pytest.raises(UserError, match="Another command is working on"):
        delete_kept([teacher.name])
    assert (home / "teachers" / teacher.name / "model.safetensors").exists()
    delete_kept([teacher.name])
    assert not (home / "teachers" / teacher.name).exists()
    assert lock.exists(), "somebody may wait for it"


def test_what_is_broken_can_be_listed_and_deleted(home: Path) -> None:
    teacher = next(entry for entry in list_kept() if entry.kind == "fine-tuned teacher")
    (home / "teachers" / teacher.name / "made_from.json").write_text("{")
    (home / "cache" / "mine.v1").mkdir()
    (home / "cache" / "mine.v1" / "a").write_text("a")
    (home / "cache" / "mine.v2").mkdir()
    (home / "cache" / "mine.v2" / "a").write_text("a")
    assert next(entry for entry in list_kept() if entry.name == teacher.name).about == ""
    assert [entry.name for entry in delete_kept([teacher.name, "mine.v1"])] != []
    assert (home / "cache" / "mine.v2").exists()
