"""A cache folder gives back what was put in, notices every changed byte, and survives kills and company."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.files import PARTIAL_PREFIX
from layerdistill.signals.cache_folder import MANIFEST_FILE, CacheFolder
from layerdistill.signals.cache_rows import StoredDtype, decode, encode, stored_bytes

WHOSE = {"teacher": "t1", "tokenizer": "k1"}


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def example(number: int, tokens: int | None = None) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(number)
    return {"3": torch.randn(tokens or 1 + number % 5, 4, generator=draw), "logits": torch.randn(1, 2, generator=draw)}


def filled(folder: Path, numbers: range, per_shard: int = 4, dtype: StoredDtype = "float32") -> CacheFolder:
    cache = CacheFolder(folder, WHOSE, dtype)
    cache.prepare()
    for start in range(numbers.start, numbers.stop, per_shard):
        cache.append({key(n): example(n) for n in range(start, min(start + per_shard, numbers.stop))})
    return cache


def assert_holds(cache: CacheFolder, numbers: range) -> None:
    for number in numbers:
        for name, rows in example(number).items():
            assert torch.equal(cache.rows(name, key(number)), rows)


# What is kept


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_float_rows_are_rounded_once_to_their_dtype(dtype: StoredDtype, bound: float) -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    kept, scale = encode(rows, dtype)
    assert scale is None
    assert kept.nbytes == 50 * stored_bytes(7, dtype)
    back = decode(kept, scale).float()
    assert ((back - rows).abs() <= bound * rows.abs()).all()
    assert bound == 0 or not torch.equal(back, rows)


def test_int8_rows_are_off_by_half_a_step_of_their_own_scale() -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 50).unsqueeze(1)
    rows[9] = 0.0
    kept, scale = encode(rows, "int8")
    assert scale is not None
    assert kept.nbytes + scale.nbytes == 50 * stored_bytes(7, "int8")
    step = rows.abs().amax(1, keepdim=True) / 127
    back = decode(kept, scale)
    assert ((back - rows).abs() <= 0.5001 * step).all()
    assert not back[9].any()


@pytest.mark.parametrize(("dtype", "value"), [("float16", 70000.0), ("int8", float("inf")), ("float32", float("nan"))])
def test_numbers_that_the_dtype_cannot_hold_are_refused(dtype: StoredDtype, value: float) -> None:
    rows = torch.ones(3, 4)
    rows[1, 2] = value
    with pytest.raises(UserError, match="cache_dtype: bfloat16 or float32"):
        encode(rows, dtype)


def test_what_was_put_in_comes_out_of_a_folder_opened_anew(tmp_path: Path) -> None:
    filled(tmp_path / "cache", range(4))
    modes = {path.name: path.stat().st_mode & 0o444 for path in (tmp_path / "cache").iterdir() if path.name != ".lock"}
    assert set(modes.values()) == {0o444}, "others may read a cache that is shared"
    assert_holds(filled(tmp_path / "c", range(10)), range(10))
    opened = CacheFolder(tmp_path / "c", WHOSE, "float32")
    assert_holds(opened, range(10))
    assert opened.has(["3", "logits"], [key(n) for n in range(10)])
    assert not opened.has(["3"], [key(10)])
    assert not opened.has(["4"], [key(1)])
    assert opened.size == sum(path.stat().st_size for path in (tmp_path / "c").glob("*.safetensors"))


def test_logits_are_kept_in_full_whatever_the_dtype(tmp_path: Path) -> None:
    cache = filled(tmp_path / "c", range(6), dtype="int8")
    for number in range(6):
        assert torch.equal(cache.rows("logits", key(number)), example(number)["logits"])
        rows = example(number)["3"]
        assert ((cache.rows("3", key(number)) - rows).abs() <= rows.abs().amax(1, keepdim=True) / 253).all()


def test_signals_are_added_later_without_touching_the_others(tmp_path: Path) -> None:
    filled(tmp_path / "c", range(8))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*.safetensors")}
    cache = CacheFolder(tmp_path / "c", WHOSE, "float32")
    assert not cache.complete(["3"])
    cache.append({key(n): {"5": example(n)["3"] + 1} for n in range(8)})
    cache.finish(["3", "5"])
    opened = CacheFolder(tmp_path / "c", WHOSE, "float32")
    assert_holds(opened, range(8))
    assert torch.equal(opened.rows("5", key(7)), example(7)["3"] + 1)
    assert opened.complete(["3", "5"])
    assert not opened.complete(["logits"])
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*.safetensors")}
    assert before.items() < after.items()


# What is refused


def test_a_folder_of_another_teacher_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    filled(tmp_path / "c", range(4))
    with pytest.raises(UserError, match=r"teacher \('t1' there, 't2' here\)"):
        CacheFolder(tmp_path / "c", {**WHOSE, "teacher": "t2"}, "float32")
    with pytest.raises(UserError, match=r"cache_dtype \('float32' there, 'int8' here\)"):
        CacheFolder(tmp_path / "c", WHOSE, "int8")
    with pytest.raises(UserError, match=r"max_length \(None there, 9 here\)"):
        CacheFolder(tmp_path / "c", {**WHOSE, "max_length": 9}, "float32")


def test_a_missing_and_a_cut_shard_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "c", range(8))
    shard = next((tmp_path / "c").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="has changed since it was written"):
        CacheFolder(tmp_path / "c", WHOSE, "float32")
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} of the teacher cache is missing"):
        CacheFolder(tmp_path / "c", WHOSE, "float32")
    shard.write_bytes(whole)
    assert_holds(CacheFolder(tmp_path / "c", WHOSE, "float32"), range(8))


def test_a_thousand_flipped_bytes_are_all_found(tmp_path: Path) -> None:
    filled(tmp_path / "c", range(12))
    files = [*(tmp_path / "c").glob("*.safetensors"), tmp_path / "c" / MANIFEST_FILE]
    draw = random.Random(0)
    for _ in range(1000):
        path = draw.choice(files)
        whole = bytearray(path.read_bytes())
        place, other = draw.randrange(len(whole)), draw.randrange(1, 256)
        whole[place] ^= other
        path.write_bytes(whole)
        with pytest.raises(UserError, match="Delete the folder"):
            CacheFolder(tmp_path / "c", WHOSE, "float32")
        whole[place] ^= other
        path.write_bytes(whole)
    assert_holds(CacheFolder(tmp_path / "c", WHOSE, "float32"), range(12))


# Kills and company


def in_a_child(work: object) -> int:
    """Run `work` in a process of its own and return its number; it ends with status 0 when `work` returned."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()  # type: ignore[operator]
            status = 0
        finally:
            os._exit(status)
    return child


def test_a_folder_with_files_of_somebody_else_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("a model")
    (tmp_path / "thesis.txt").write_text("a thesis")
    with pytest.raises(UserError, match=r"a folder of its own, but .* \(model\.safetensors, thesis\.txt\)"):
        CacheFolder(tmp_path, WHOSE, "float32").prepare()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "thesis.txt"]


def test_what_nobody_put_there_and_what_a_kill_left_is_no_reason_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    for name in (".DS_Store", ".tmpQCx5n0", f"{'0' * 32}.safetensors"):
        (tmp_path / name).write_text("")
    CacheFolder(tmp_path, WHOSE, "float32").prepare()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"lost+found", ".DS_Store", ".lock", MANIFEST_FILE}


def test_a_cache_that_another_process_is_making_is_not_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Path.iterdir
    other = CacheFolder(tmp_path, WHOSE, "float32")

    def late(folder: Path) -> Iterator[Path]:
        monkeypatch.setattr(Path, "iterdir", listed)
        other.prepare()
        other.append({key(1): example(1)})
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", late)
    CacheFolder(tmp_path, WHOSE, "float32").prepare()
    assert_holds(CacheFolder(tmp_path, WHOSE, "float32"), range(1, 2))


def test_files_that_were_put_into_a_cache_later_stay(tmp_path: Path) -> None:
    CacheFolder(tmp_path, WHOSE, "float32").prepare()
    (tmp_path / "model.safetensors").write_text("a model")
    CacheFolder(tmp_path, WHOSE, "float32").prepare()
    assert (tmp_path / "model.safetensors").read_text() == "a model"


def test_a_place_that_cannot_be_written_is_refused_with_the_right_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"another folder with teacher\.cache_folder"):
        CacheFolder(tmp_path / "file", WHOSE, "float32").prepare()


def test_what_a_kill_left_is_swept(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path / "c", WHOSE, "float32")
    cache.prepare()
    cache.append({key(1): example(1, tokens=3)})
    for name in (".tmpQCx5n0", f"{PARTIAL_PREFIX}1.safetensors", f"{'0' * 32}.safetensors"):
        (tmp_path / "c" / name).write_text("half")
    CacheFolder(tmp_path / "c", WHOSE, "float32").prepare()
    assert {path.name for path in (tmp_path / "c").iterdir()} == {cache.shards[0]["file"], MANIFEST_FILE, ".lock"}


def test_a_kill_loses_the_shard_in_work_and_no_more(tmp_path: Path) -> None:
    draw = random.Random(3)

    def fill() -> None:
        cache = CacheFolder(tmp_path / "c", WHOSE, "float32")
        cache.prepare()
        for start in range(0, 4000, 4):
            numbers = [n for n in range(start, start + 4) if not cache.has(["3"], [key(n)])]
            if numbers:
                cache.append({key(n): example(n, tokens=200) for n in numbers})

    before = 0
    for _ in range(20):
        child = in_a_child(fill)
        time.sleep(draw.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cache = CacheFolder(tmp_path / "c", WHOSE, "float32")
        found = sum(cache.has(["3"], [key(n)]) for n in range(4000))
        assert found >= before, "what was written once stays"
        assert cache.has(["3", "logits"], [key(n) for n in range(found)]), "in order, without gaps"
        for number in random.Random(found).sample(range(found), min(found, 5)):
            assert torch.equal(cache.rows("3", key(number)), example(number, tokens=200)["3"])
        before = found
    assert 0 < before < 4000, "killed at work"
    cache.prepare()
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        *(shard["file"] for shard in cache.shards), MANIFEST_FILE, ".lock",
    }  # fmt: skip


def test_two_processes_may_fill_one_folder_at_once(tmp_path: Path) -> None:
    children = [in_a_child(partial(filled, tmp_path / "c", range(60), per_shard)) for per_shard in (3, 4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    cache = CacheFolder(tmp_path / "c", WHOSE, "float32")
    assert_holds(cache, range(60))
    assert sum(shard["examples"] for shard in cache.shards) == 60, "nothing is kept twice"
