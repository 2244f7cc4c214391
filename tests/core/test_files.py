"""Files are whole or not there, whatever happens in the middle of writing them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layerdistill.core import files
from layerdistill.core.errors import UserError
from layerdistill.core.files import (
    PARTIAL_PREFIX,
    explained_disk_errors,
    read_json,
    replace_folder,
    sweep_partials,
    whole_folder,
    write_bytes,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_bytes_and_json_come_back(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "a.bin", b"\x00\xff")
    write_text(tmp_path / "b.txt", "ä\n")
    write_json(tmp_path / "c.json", {"b": [1, 2.5, None], "a": Path("x")})
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b.txt").read_bytes() == "ä\n".encode()
    assert read_json(tmp_path / "c.json") == {"b": [1, 2.5, None], "a": "x"}
    assert names(tmp_path) == ["b.txt", "c.json", "new"], "nothing is left beside them"


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "x")
    with whole_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


def test_json_has_no_nan_and_the_old_file_stays(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"value": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"value": math.nan})
    assert read_json(tmp_path / "a.json") == {"value": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_broken_json_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"value": ')
    with pytest.raises(UserError, match=r"a\.json is not valid JSON .*Delete it"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_text(tmp_path / "a", "old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(type(error)):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with whole_folder(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
        assert partial.parent == tmp_path, "a rename must not cross file systems"
    assert names(target) == ["a"]
    with whole_folder(target) as partial:
        assert names(partial) == []
        (partial / "b").write_text("2")
        assert names(target) == ["a"], "the old one is there until the end"
    assert names(target) == ["b"], "the new one replaces it, nothing is mixed"
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_midway_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with whole_folder(tmp_path / "target") as partial:
        (partial / "a").write_text("old")
    with pytest.raises(error), whole_folder(tmp_path / "target") as partial:  # noqa: PT012 - the half is the point
        (partial / "a").write_text("new")
        (partial / "b").write_text("new")
        raise error
    assert names(tmp_path) == ["target"]
    assert names(tmp_path / "target") == ["a"]
    assert (tmp_path / "target" / "a").read_text() == "old"


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("target", "old"), ("source", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(content)
    rename = os.replace

    def fail_for_the_new_one(source: Path, target: Path) -> None:
        if Path(source).name == "source":
            raise OSError("device gone")
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", fail_for_the_new_one)
    with pytest.raises(OSError, match="device gone"):
        replace_folder(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target" / "a").read_text() == "old"
    assert names(tmp_path) == ["source", "target"]


ENDLESS = """
import sys
from pathlib import Path
from layerdistill.core.files import whole_folder, write_text
target = Path(sys.argv[1])
number = 0
while True:
    number += 1
    write_text(target / "file", f"{number}\\n" * 5000)
    with whole_folder(target / "folder") as partial:
        for part in range(3):
            (partial / str(part)).write_text(f"{number}\\n" * 1000)
    if number == 1:
        print("started", flush=True)
"""


def test_kill_at_any_moment_leaves_nothing_half_written(tmp_path: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline() == "started\n"
    for _ in range(200):
        text = (tmp_path / "file").read_text()
        assert len(set(text.split())) == 1
        assert text.count("\n") == 5000, "a reader sees the old file or the new one"
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    running.stdout.close()
    sweep_partials(tmp_path)
    assert set(names(tmp_path)) <= {"file", "folder"}
    if (tmp_path / "folder").exists():  # killed between two renames it is gone, never half there
        contents = [(tmp_path / "folder" / str(part)).read_text() for part in range(3)]
        assert len(set(contents)) == 1
        assert contents[0].count("\n") == 1000


def test_sweeping_deletes_what_is_unfinished_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f"{PARTIAL_PREFIX}file").write_text("x")
    (tmp_path / f"{PARTIAL_PREFIX}folder" / "below").mkdir(parents=True)
    (tmp_path / "kept" / f"{PARTIAL_PREFIX}inside").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    sweep_partials(tmp_path)
    assert names(tmp_path) == ["file", "kept"]
    assert names(tmp_path / "kept") == [f"{PARTIAL_PREFIX}inside"]


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    expected = rf"The student cannot be written to {tmp_path}: No space left on device"
    with pytest.raises(UserError, match=expected), explained_disk_errors("The student", tmp_path):
        raise OSError(28, "No space left on device")


def test_of_torchs_errors_only_those_of_writing_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="PytorchStreamWriter"), explained_disk_errors("The checkpoint", tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")
    with pytest.raises(RuntimeError, match="shapes"), explained_disk_errors("The checkpoint", tmp_path):
        raise RuntimeError("shapes do not fit")
