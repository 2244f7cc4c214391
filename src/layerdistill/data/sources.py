"""The places data come from: local files, a folder of splits, the hub, memory, the installed documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from layerdistill.core.errors import UserError, did_you_mean, one_of
from layerdistill.data.config import IN_MEMORY, INSTALLED_DOCS, SPLITS, DataConfig
from layerdistill.data.installed_docs import installed_docs
from layerdistill.data.paths import is_hub_id, listed_places, locate
from layerdistill.data.read_files import SUFFIXES, read_files, table_of

Memory = Mapping[str, Dataset | Sequence[Mapping[str, Any]]]
"""Data handed over in Python, by split: a `datasets.Dataset`, or a list of dicts with the columns as keys."""

SPLIT_STEMS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""Names of files in a folder that hold each split; a number may follow, as in `train-00000-of-00002.parquet`."""


def read_sources(config: DataConfig, base: Path | None, memory: Memory | None) -> dict[str, Dataset]:
    """Return the raw rows of every split that `config` names or that its training source brings with it.

    Not the training data where they are a stream.

    Raises one UserError with every missing or unreadable source.
    """
    splits: dict[str, Dataset] = {}
    whole = [split for split in SPLITS if not (config.streaming and split == "train")]
    problems = [one_of("a split handed over in Python", name, SPLITS) for name in memory or {} if name not in SPLITS]
    for split in whole:
        try:
            dataset = _read_split(config, split, base, memory or {})
        except UserError as error:
            problems.extend(error.problems)
            continue
        if dataset is not None and len(dataset) == 0:
            problems.append(f"data.{split} ({_shown(getattr(config, split) or config.train)}) has no rows. Give data.")
        elif dataset is not None:
            splits[split] = dataset
    if problems:
        raise UserError(*problems)
    return splits


def _read_split(config: DataConfig, split: str, base: Path | None, memory: Memory) -> Dataset | None:
    given = getattr(config, split)
    if split in memory:
        return _from_memory(memory[split], split)
    if given is None:
        return _brought_along(config, split, base)
    if isinstance(given, list):
        return read_files([_existing_file(name, split, base) for name in given], config.text_columns)
    return _read_one(given, split, base, config.text_columns)


def _read_one(given: str, split: str, base: Path | None, text_columns: tuple[str, ...]) -> Dataset:
    if given == IN_MEMORY:
        raise UserError(
            f"data.{split} is {IN_MEMORY!r}, but no {split} data were handed over. Name a file or a hub id."
        )
    if given == INSTALLED_DOCS:
        return installed_docs()[split]
    place = locate(given, base)
    if place is None:
        return hub_data(given, split, base)
    return read_files(_files_at(place, split), text_columns)


def _files_at(place: Path, split: str) -> list[Path]:
    """Return a file, or those of a folder that hold `split`; raises UserError where there are none."""
    if place.is_file():
        return [place]
    files = split_files(place, split)
    if not files:
        raise UserError(
            f"data.{split} is the folder {place}, which holds no {split} file: looked for "
            f"{', '.join(SPLIT_STEMS[split])} with one of {', '.join(SUFFIXES)}. There: {_contents(place)}."
        )
    return files


def training_files(config: DataConfig, base: Path | None) -> list[Path] | None:
    """Return the files that `data.train` names, or None where it is on the hub; raises UserError for a missing one."""
    if isinstance(config.train, list):
        return [_existing_file(name, "train", base) for name in config.train]
    place = locate(config.train, base)
    return None if place is None else _files_at(place, "train")


def _brought_along(config: DataConfig, split: str, base: Path | None) -> Dataset | None:
    if config.train == INSTALLED_DOCS:
        return installed_docs()[split]
    place = locate(config.train, base) if isinstance(config.train, str) else None
    if place is None or not place.is_dir():
        return None
    files = split_files(place, split)
    return read_files(files, config.text_columns) if files else None


def split_files(folder: Path, split: str) -> list[Path]:
    """Return the files of `folder` (not below it) that hold `split`, sorted by name."""
    stems = "|".join(SPLIT_STEMS[split])
    pattern = re.compile(rf"({stems})([-_.]?\d.*)?", re.IGNORECASE)
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and pattern.fullmatch(path.stem))


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "nothing"


def _existing_file(given: str, split: str, base: Path | None) -> Path:
    place = locate(given, base)
    if place is None or not place.is_file():
        raise UserError(f"data.{split}: there is no file {given!r}. Tried: {listed_places(given, base)}.")
    return place


def _from_memory(data: Any, split: str) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if isinstance(data, IterableDataset) or not isinstance(data, Sequence) or isinstance(data, str):
        raise UserError(
            f"the {split} data are a {type(data).__name__}, but must be a datasets.Dataset or a list of dicts. "
            "A streamed data set has to be made a Dataset first."
        )
    return Dataset(table_of([dict(row) if isinstance(row, Mapping) else row for row in data], f"the {split} data"))


def hub_data(given: str, split: str, base: Path | None, streaming: bool = False) -> Any:
    """Return a split of the hub data set `given`, row by row if `streaming`; raises UserError where there is none."""
    name, _, rest = given.partition(":")
    subset, _, wanted = rest.partition(":")
    if not is_hub_id(name, SUFFIXES):
        raise UserError(
            f"data.{split} is {given!r}, but there is no such file or folder. Tried: {listed_places(given, base)}. "
            f"Allowed: a file ({', '.join(SUFFIXES)}), a folder, a hub id 'owner/name[:config[:split]]', or "
            f"'{INSTALLED_DOCS}'.{did_you_mean(given, [INSTALLED_DOCS])}"
        )
    try:
        return load_dataset(name, subset or None, split=wanted or split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data.{split} is {given!r}: there is no such file or folder (tried {listed_places(given, base)}), and "
            f"the hub data set {name!r} (config {subset or 'default'}, split {wanted or split}) cannot be loaded: "
            f"{reason}. Check the spelling and the network, or give a local file."
            f"{did_you_mean(given, [INSTALLED_DOCS])}"
        ) from error


def _shown(source: str | list[str]) -> str:
    return source if isinstance(source, str) else ", ".join(source)
