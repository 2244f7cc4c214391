"""A stream gives the blocks that the same files give in memory, holds little of them, and says what is wrong."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from data_samples import byte_tokenizer, write_rows
from datasets import IterableDataset
from torch.utils.data import DataLoader

from layerdistill.core.errors import UserError
from layerdistill.data import LabelSpace, label_space, load_splits, streamed_blocks, tokenise
from layerdistill.data.config import DataConfig
from layerdistill.data.streamed import LOADERS
from layerdistill.train.stream import Endless

TEXTS = ["good film", "1999", "NA", "the story , very dull", "", "he said:\nno", 'an unpaired " quote'] * 4
ROWS = [{"text": text, "number": number} for number, text in enumerate(TEXTS)]
TSV_ROWS = [row for row in ROWS if "\n" not in row["text"]]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("local data must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def language_model(train: Any, **changes: Any) -> DataConfig:
    given = {"task": "causal-lm", "text": "text", "max_length": 16, "streaming": True, "shuffle_buffer": 0, **changes}
    return DataConfig(train=train, **given)


def streamed(config: DataConfig, seed: int = 0) -> IterableDataset:
    return streamed_blocks(config, None, byte_tokenizer(), seed)


def in_memory(config: DataConfig) -> list[dict[str, Any]]:
    listed = config.model_copy(update={"streaming": False})
    return list(tokenise(load_splits(listed), listed, byte_tokenizer(), LabelSpace(0, (), None))["train"])


def written(folder: Path, suffix: str) -> Path:
    if suffix == ".txt":
        path = folder / "some.txt"
        path.write_text("\n".join(TEXTS))
        return path
    return write_rows(folder / f"some{suffix}", TSV_ROWS if suffix == ".tsv" else ROWS)


@pytest.mark.parametrize("separator", ["eos", "none"])
@pytest.mark.parametrize("suffix", [suffix for suffix in LOADERS if suffix != ".json"])
def test_the_blocks_are_those_of_the_files_in_memory_and_nothing_is_written(
    suffix: str, separator: str, tmp_path: Path
) -> None:
    path = written(tmp_path, suffix)
    config = language_model(str(path), separator=separator)
    found = list(streamed(config))
    assert len(found) > 10
    assert found == in_memory(config)
    assert list(tmp_path.iterdir()) == [path]


def test_a_json_file_of_lines_or_of_one_list(tmp_path: Path) -> None:
    lines = written(tmp_path / "a", ".jsonl")
    expected = in_memory(language_model(str(lines)))
    assert list(streamed(language_model(str(lines.rename(lines.with_suffix(".json")))))) == expected
    assert list(streamed(language_model(str(write_rows(tmp_path / "b" / "some.json", ROWS))))) == expected


def test_several_files_and_a_folder(tmp_path: Path) -> None:
    files = [str(write_rows(tmp_path / f"train-{part}.jsonl", ROWS[part::3])) for part in range(3)]
    write_rows(tmp_path / "test.jsonl", ROWS[:3])
    config = language_model(files)
    assert list(streamed(config)) == in_memory(config)
    folder = language_model(str(tmp_path))
    assert list(streamed(folder)) == in_memory(config)
    splits = load_splits(folder)
    assert list(splits) == ["test"]
    assert label_space(splits, folder).num_labels == 0


def test_each_pass_has_its_order_which_the_seed_decides(tmp_path: Path) -> None:
    plain = language_model(str(written(tmp_path, ".jsonl")))
    mixed = plain.model_copy(update={"shuffle_buffer": 8})
    orders = {}
    for seed in (1, 1, 2):
        stream = streamed(mixed, seed)
        for number in range(2):
            stream.set_epoch(number)
            order = [row["example_id"] for row in stream]
            assert orders.setdefault((seed, number), order) == order
    assert len({tuple(order) for order in orders.values()}) == 4
    assert all(sorted(order) == list(range(len(order))) for order in orders.values())
    assert len(orders[1, 0]) == len(list(streamed(plain)))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("buffer", [0, 5])
def test_data_loader_workers_read_every_file_in_the_same_order(buffer: int, workers: int, tmp_path: Path) -> None:
    files = []
    for number in range(3):
        rows = [{**row, "text": f"{row['text']} {number}"} for row in ROWS]
        files.append(str(write_rows(tmp_path / f"{number}.jsonl", rows)))
    config = language_model(files, shuffle_buffer=buffer)
    steps = 2 * len(in_memory(config))  # two passes
    expected, found = (
        list(islice(DataLoader(Endless(streamed(config)), batch_size=None, num_workers=number), steps))
        for number in (0, workers)
    )
    assert [row["input_ids"] for row in found] == [row["input_ids"] for row in expected]
    assert {row["example_id"] for row in found} == set(range(steps // 2))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_without_rows_is_refused_by_whoever_reads_it(workers: int) -> None:
    empty = IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(UserError, match="gives no example"):
        next(iter(DataLoader(Endless(empty), batch_size=None, num_workers=workers)))


def test_at_most_so_many_blocks_the_first_ones(tmp_path: Path) -> None:
    config = language_model(str(written(tmp_path, ".jsonl")), max_train_examples=3, shuffle_buffer=10)
    assert sorted(row["example_id"] for row in streamed(config)) == [0, 1, 2]


def test_no_more_is_read_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(1000):
            read.append(number)
            yield {"text": "ten tokens"}

    monkeypatch.setattr("layerdistill.data.pack.BATCH_CHARACTERS", 50)
    monkeypatch.setattr("layerdistill.data.streamed.streamed_rows", lambda *_: IterableDataset.from_generator(rows))
    stream = iter(streamed(language_model("any.jsonl")))
    assert len(read) < 20, "the first block is looked at"
    read.clear()
    for _ in range(10):
        next(stream)
    assert len(read) < 30


def test_a_hub_data_set_is_asked_for_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def hub(*names: Any, **options: Any) -> IterableDataset:
        asked.append((names, options))
        return IterableDataset.from_generator(lambda: iter(ROWS))

    monkeypatch.setattr("layerdistill.data.sources.load_dataset", hub)
    assert len(list(streamed(language_model("owner/corpus:plain")))) > 10
    assert asked == [(("owner/corpus", "plain"), {"split": "train", "streaming": True})]


def test_rows_without_text_are_refused_or_dropped(tmp_path: Path) -> None:
    rows = [{"text": None if number % 5 == 4 else row["text"]} for number, row in enumerate(ROWS)]
    path = write_rows(tmp_path / "some.jsonl", rows)
    with pytest.raises(UserError, match=r"'text' has no text in row 4.*drop_empty"):
        list(streamed(language_model(str(path))))
    dropped = language_model(str(path), drop_empty=True)
    assert list(streamed(dropped)) == in_memory(dropped)


def broken_parquet(folder: Path) -> Path:
    path = written(folder, ".parquet")
    path.write_bytes(path.read_bytes()[:-20])
    return path


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (lambda folder: written(folder, ".jsonl"), {"text": "txt"}, "no column 'txt'.*It has: text, number.*Did you"),
        (lambda folder: written(folder, ".jsonl"), {"text": "number"}, "'number' .* holds 0 in row 0, not text"),
        (lambda folder: folder / "none.jsonl", {}, "there is no such file or folder"),
        (lambda folder: [str(folder / "none.jsonl")], {}, "there is no file"),
        (lambda folder: "installed-docs", {}, "which is in memory"),
        (lambda folder: "in-memory", {}, "which is in memory"),
        (lambda folder: [str(written(folder, kind)) for kind in (".jsonl", ".csv")], {}, "of 2 kinds .*csv, .jsonl"),
        (lambda folder: write_rows(folder / "some.jsonl", ROWS[:1]), {}, "fewer tokens in all than one block"),
        (lambda folder: write_rows(folder / "some.xml", ROWS), {}, "name must end in"),
        (broken_parquet, {}, "data.train cannot be read: .*Check that its files are whole"),
    ],
)  # fmt: skip
def test_what_cannot_be_streamed_is_said_before_anything_is_trained(
    make: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = make(tmp_path)
    train = given if isinstance(given, list) else str(given)
    with pytest.raises(UserError, match=message):
        streamed(language_model(train, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sequence-classification"}, "only causal-lm with pack: true can be streamed"),
        ({"pack": False}, "only causal-lm with pack: true can be streamed"),
        ({"streaming": False, "shuffle_buffer": 7}, "shuffle_buffer has a meaning only with data.streaming"),
    ],
)
def test_keys_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        language_model("some.jsonl", **changes)
