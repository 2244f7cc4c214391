"""Training data without a length: the same student as from a list, and a teacher that is run once for each example."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny_models import tiny_model
from torch.utils.data import IterableDataset as TorchIterableDataset
from toy import toy_dataset
from toy_recipe import toy_tokenizer

import layerdistill as ld
from layerdistill.core.errors import UserError
from layerdistill.signals import cache_folder

HEADS = {"bert": "sequence-classification", "gpt2": "causal-lm"}
STEPS = 16
"""Two passes over 32 examples, four at a time."""


def data_of(task: str) -> Dataset:
    return toy_dataset(task, size=32)


def trained(
    folder: Path, data: Any, family: str = "bert", method: str = "ild", cache: Any = None, **arguments: Any
) -> dict[str, torch.Tensor]:
    head = HEADS[family]
    teacher, student = (tiny_model(family, head, num_layers=blocks, seed=blocks) for blocks in (4, 2))
    given = {
        "per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential", "use_cpu": True, "disable_tqdm": True,
        "padding_free": False,  # which changes the last bits of a state with the texts around it
        **arguments,
    }  # fmt: skip
    args = ld.LayerDistillationConfig(output_dir=str(folder), **given)
    ld.distill(teacher, student, data, method=method, args=args, processing_class=toy_tokenizer(), cache=cache)
    return student.state_dict()


class Breaking(TorchIterableDataset):
    """Rows again and again, until `after` of them were read."""

    def __init__(self, rows: Any, after: int = sys.maxsize) -> None:
        self.rows = list(rows)
        self.left = after

    def __iter__(self) -> Any:
        for row in self.rows:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("the connection is gone")
            yield row


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("family", list(HEADS))
def test_a_stream_trains_the_student_that_a_list_trains(family: str, tmp_path: Path) -> None:
    data = data_of(HEADS[family])
    listed = trained(tmp_path / "list", data, family)
    streamed = trained(tmp_path / "stream", data.to_iterable_dataset(), family)
    untold = IterableDataset.from_generator(lambda: iter(data))
    assert untold.column_names is None, "a generator does not tell its columns"
    assert same(listed, streamed) and same(listed, trained(tmp_path / "generated", untold, family))


@pytest.mark.parametrize(("family", "method"), [("bert", "ild"), ("bert", "rail_kd"), ("gpt2", "kd"), ("gpt2", "cka")])
def test_the_teacher_is_run_once_for_each_example(
    family: str, method: str, tmp_path: Path, teacher_runs: list[int]
) -> None:
    stream = data_of(HEADS[family]).to_iterable_dataset()
    live = trained(tmp_path / "live", stream, family, method)
    assert sum(teacher_runs) == 64
    teacher_runs.clear()
    cache = ld.CacheConfig("fill", "float32", tmp_path / "cache")
    filled = trained(tmp_path / "fill", stream, family, method, cache)
    assert sum(teacher_runs) == 32, "the second pass is read"
    teacher_runs.clear()
    again = trained(tmp_path / "again", stream, family, method, cache)
    only = trained(
        tmp_path / "require", stream, family, method, ld.CacheConfig("require", "float32", tmp_path / "cache")
    )
    assert teacher_runs == []
    for name, tensor in live.items():
        torch.testing.assert_close(filled[name], tensor, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=1e-5)
    assert same(again, only)


def test_examples_that_come_later_are_added(tmp_path: Path, teacher_runs: list[int]) -> None:
    data = data_of("sequence-classification")
    cache = ld.CacheConfig("fill", folder=tmp_path / "cache")
    trained(tmp_path / "first", data.select(range(20)).to_iterable_dataset(), cache=cache)
    assert sum(teacher_runs) == 20
    trained(tmp_path / "second", data.to_iterable_dataset(), cache=cache)
    assert sum(teacher_runs) == 32, "the first twenty are known, whatever stream they come in"
    more = toy_dataset("sequence-classification", size=8, seed=9).to_iterable_dataset()
    with pytest.raises(UserError, match="lacks some examples of the stream"):
        trained(tmp_path / "third", more, cache=ld.CacheConfig("require", folder=tmp_path / "cache"))


def test_what_was_said_before_an_error_is_kept(tmp_path: Path, teacher_runs: list[int]) -> None:
    data = data_of("sequence-classification")

    def broken() -> Any:
        yield from data.select(range(24))
        raise RuntimeError("the stream broke off")

    cache = ld.CacheConfig("fill", folder=tmp_path / "cache")
    with pytest.raises(RuntimeError, match="broke off"):
        trained(tmp_path / "broken", IterableDataset.from_generator(broken), cache=cache)
    known = sum(teacher_runs)
    assert known >= 16
    trained(tmp_path / "whole", data.to_iterable_dataset(), cache=cache)
    assert sum(teacher_runs) == 32


def test_a_cache_that_may_not_grow_leaves_the_rest_to_the_teacher(tmp_path: Path, teacher_runs: list[int]) -> None:
    stream = data_of("sequence-classification").to_iterable_dataset()
    live = trained(tmp_path / "live", stream)
    teacher_runs.clear()
    small = trained(tmp_path / "small", stream, cache=ld.CacheConfig("fill", "float32", tmp_path / "cache", gb=1e-5))
    assert 32 < sum(teacher_runs) < 64
    for name, tensor in live.items():
        torch.testing.assert_close(small[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_disk_that_refuses_leaves_the_rest_to_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = data_of("sequence-classification").to_iterable_dataset()
    live = trained(tmp_path / "live", stream)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_folder, "save_file", full)
    assert same(live, trained(tmp_path / "full", stream, cache=ld.CacheConfig("fill", folder=tmp_path / "cache")))
    assert "What the teacher said last is not kept" in caplog.text


def test_maps_that_are_drawn_for_every_step_find_their_layers(tmp_path: Path, teacher_runs: list[int]) -> None:
    stream = data_of("sequence-classification").to_iterable_dataset()
    method = {"name": "ild", "layer_map": "random", "redraw": "batch"}
    live = trained(tmp_path / "live", stream, method=method)
    teacher_runs.clear()
    cache = ld.CacheConfig("fill", "float32", tmp_path / "cache")
    filled = trained(tmp_path / "fill", stream, method=method, cache=cache)
    assert sum(teacher_runs) == 32, "the first pass keeps what any step will read"
    for name, tensor in live.items():
        torch.testing.assert_close(filled[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("stop", [6, 12])
def test_a_resumed_stream_goes_on_where_it_was(stop: int, tmp_path: Path) -> None:
    data = data_of("sequence-classification").select(range(30))  # no whole number of batches
    whole = trained(tmp_path / "whole", Breaking(data), gradient_accumulation_steps=2)
    arguments = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": stop}
    with pytest.raises(RuntimeError, match="the connection is gone"):
        trained(tmp_path / "stopped", Breaking(data, after=ld.api.FIRST_ROWS + (stop + 1) * 8), **arguments)
    assert (tmp_path / "stopped" / "checkpoints" / "distill" / f"checkpoint-{stop}").is_dir()
    assert same(whole, trained(tmp_path / "stopped", Breaking(data), **arguments))


def test_a_folder_knows_its_stream(tmp_path: Path) -> None:
    trained(tmp_path / "run", data_of("sequence-classification").to_iterable_dataset())
    other = toy_dataset("sequence-classification", size=32, seed=5).to_iterable_dataset()
    with pytest.raises(UserError, match=r"state of another distillation \(data were"):
        trained(tmp_path / "run", other)


def test_auto_runs_the_teacher_of_a_stream(tmp_path: Path, teacher_runs: list[int]) -> None:
    trained(
        tmp_path / "auto", data_of("sequence-classification").to_iterable_dataset(),
        cache=ld.CacheConfig(folder=tmp_path / "cache"),
    )  # fmt: skip
    assert sum(teacher_runs) == 64 and not (tmp_path / "cache").exists()


def test_a_stream_is_refused_where_its_end_is_needed(tmp_path: Path) -> None:
    stream = data_of("sequence-classification").to_iterable_dataset()
    with pytest.raises(UserError, match="has no length, so the number of steps must be given"):
        trained(tmp_path / "endless", stream, max_steps=-1)
    models = [tiny_model("bert", "sequence-classification", num_layers=blocks) for blocks in (2, 4)]
    args = ld.LayerDistillationConfig(output_dir=str(tmp_path / "trainer"), use_cpu=True)
    cache = ld.CacheConfig("fill", folder=tmp_path / "cache")
    with pytest.raises(UserError, match="has no length, so the number of steps must be given"):
        ld.LayerDistillationTrainer(*models, "ild", args, stream, cache=cache)
    assert not (tmp_path / "cache").exists(), "refused before anything is made"
    recorded = {"name": "ted", "stage_one": {"max_steps": 4}}
    with pytest.raises(UserError, match="what a model says about all of it was to be recorded"):
        trained(tmp_path / "ted", stream, method=recorded)
    trained(tmp_path / "run", stream, method={"name": "ted", "stage_one": {"max_steps": 4, "record_gb": 0}})
    args = ld.LayerDistillationConfig(output_dir=str(tmp_path / "prune"), max_steps=2, use_cpu=True)
    teacher = tiny_model("bert", "sequence-classification", num_layers=4)
    with pytest.raises(UserError, match="calibration draws rows of train, but that is a IterableDataset"):
        ld.distill(
            teacher, None, stream, method="layer_prune", args=args, processing_class=toy_tokenizer(),
            num_removed=1, calibration={"split": "train"},
        )  # fmt: skip
