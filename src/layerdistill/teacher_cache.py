"""The teacher of a stage: the live model, or what it said before, by what the recipe wants and what it would cost."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import PartialState
from torch import nn

from layerdistill.core.errors import UserError, one_of
from layerdistill.core.fingerprint import fingerprint_json, fingerprint_model
from layerdistill.core.home import CACHES, home, note_use
from layerdistill.core.needs import needs_during
from layerdistill.core.padding import unusual_padding
from layerdistill.core.processes import agreed
from layerdistill.core.types import Batch, Needs, Stage, TeacherSource
from layerdistill.data import fingerprint_dataset
from layerdistill.models import TeacherConfig
from layerdistill.models.config import CacheDtype, CacheMode
from layerdistill.prepare import Prepared
from layerdistill.signals import LiveTeacher
from layerdistill.signals.cache_folder import (
    MANIFEST_FILE,
    CacheFolder,
    differences,
    read_manifest,
    refuse_a_used_folder,
    refuse_another,
)
from layerdistill.signals.cache_rows import LOG_PROBABILITIES, TOKENS, StoredDtype
from layerdistill.signals.cache_size import cached_bytes, distinct_lengths
from layerdistill.signals.cached_teacher import CachedTeacher
from layerdistill.signals.streamed_teacher import StreamedTeacher
from layerdistill.teacher_needs import AskingStage, asking_stages, needs_of
from layerdistill.train.config import argument_of
from layerdistill.train.stage import StageInput, stage_arguments

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The columns that a teacher's answer depends on."""

WORTH_KEEPING = 1.5
"""Passes over the data from which on `auto` keeps what the teacher says: one is what filling costs."""

SHARE_OF_DISK = 0.9
"""Most of the free disk that a cache may take."""


@dataclass(frozen=True)
class CacheConfig:
    """Whether, where and how what a teacher says is kept: a recipe's `teacher.cache*` keys, for Python."""

    mode: CacheMode = "auto"
    dtype: CacheDtype = "auto"
    folder: str | Path | None = None
    gb: float = 10.0

    def __post_init__(self) -> None:
        words = {"mode": get_args(CacheMode), "dtype": get_args(CacheDtype)}
        if wrong := [name for name, allowed in words.items() if getattr(self, name) not in allowed]:
            raise UserError(*(one_of(f"CacheConfig.{name}", getattr(self, name), words[name]) for name in wrong))
        if not (isinstance(self.gb, int | float) and self.gb > 0):
            raise UserError(f"CacheConfig.gb is {self.gb!r}, but must be above 0 (gigabytes).")

    @classmethod
    def of(cls, section: TeacherConfig | None) -> CacheConfig | None:
        """Return what a recipe's teacher section says, None without one."""
        if section is None:
            return None
        return cls(section.cache, section.cache_dtype, section.cache_folder, section.cache_gb)


@dataclass(frozen=True)
class Quote:
    """What keeping a stage's signals would take."""

    needed: int
    free: int

    def __str__(self) -> str:
        return f"{self.needed / 1e9:.3g} GB, {self.free / 1e9:.3g} GB are free"


class StageTeachers:
    """Gives each stage of a run its teacher; a cache is filled before the first step of the stage that needs it."""

    def __init__(self, model: nn.Module | None, config: CacheConfig | None, given: StageInput) -> None:
        if config is not None and not isinstance(config, CacheConfig):
            raise UserError(f"cache is {config!r}: pass a layerdistill.CacheConfig, for example CacheConfig('fill').")
        packs = argument_of(given.training, "padding_free")
        self.live = LiveTeacher(model, padding_free=packs) if model is not None else None
        self.config = config
        self.given = given
        self.language_model = given.task == "causal-lm"
        self.opened: CacheFolder | None = None

    def refuse_early(self, stages: Sequence[AskingStage]) -> None:
        """Raise UserError for a cache that was made for something else or, where it may only be read, lacks something.

        `auto` has none to refuse unless its folder was named. What is lacking of a stream, and of layers that are
        chosen while the method runs, is found when it comes.
        """
        needs, certain = needs_of(stages), needs_of(stage for stage in stages if stage.certain)
        if self.live is None or self.config is None or self.config.mode == "off":
            return
        if self.config.mode != "auto":
            refuse_padding(needs)
        if needs.teacher_at_all and (self.config.mode != "auto" or self.config.folder is not None):
            cached = CachedTeacher(self.live, self.open(), self.language_model)
            if self.config.mode == "require" and isinstance(self.given.datasets["train"], Sized):
                complete = cached.folder.complete(cached.names(certain))
                if not (complete and cached.folder.completed):
                    raise UserError(self.nothing_cached(cached, certain if certain.teacher_at_all else needs, FIRST))

    def of(self, stage: Stage) -> TeacherSource | None:
        """Return the source of a stage that has none of its own; raises UserError where `require` finds no cache."""
        if self.live is None or stage.teacher is not None or self.config is None or self.config.mode == "off":
            return self.live
        if not isinstance(self.given.datasets["train"], Sized):
            return self.streamed(stage)
        epochs, steps = self.length_of(stage.training)
        needs = needs_during(stage.terms, math.ceil(epochs), steps)
        return self.source(needs, epochs)

    def streamed(self, stage: Stage) -> TeacherSource:
        """Return the teacher of a data set without a length; `auto` runs it, for no example may come twice."""
        assert self.live is not None and self.config is not None, "of() has seen to it"
        if self.config.mode == "auto":
            return self.live
        folder = self.open()
        if self.config.mode == "fill":
            self.prepare(folder)
        needs = needs_during(stage.terms, 1, stage_arguments(self.given, stage, self.given.folder).max_steps)
        refuse_padding(needs)
        cached = CachedTeacher(self.live, folder, self.language_model, only_cached=self.config.mode == "require")
        note_use(folder.folder / MANIFEST_FILE)
        on_disk = folder.size + SHARE_OF_DISK * free_at(folder.folder)
        return StreamedTeacher(cached, needs, min(self.config.gb * 1e9, on_disk))

    def source(self, needs: Needs, epochs: float) -> TeacherSource | None:
        """Return what says `needs` for `epochs` passes, filled where it is to be."""
        assert self.live is not None and self.config is not None, "of() has seen to it"
        if not needs.teacher_at_all:
            return self.live
        if self.config.folder is not None:
            self.open()
        try:
            return self.cached(needs, epochs)
        except UserError as error:
            if self.config.mode != "auto":
                raise
            self.given.console.print(f"The teacher is not cached: {' '.join(error.problems)}", highlight=False)
            return self.live

    def cached(self, needs: Needs, epochs: float) -> CachedTeacher:
        """Return the cache, filled; raises UserError where it cannot be, and where `auto` finds it not worth while."""
        assert self.live is not None and self.config is not None, "of() has seen to it"
        mode = self.config.mode
        refuse_padding(needs)
        folder = self.open()
        cached = CachedTeacher(self.live, folder, self.language_model, only_cached=mode == "require")
        if not agreed(folder.complete(cached.names(needs))):
            if mode == "auto" and epochs < WORTH_KEEPING:
                raise UserError(f"{epochs:.3g} passes over the data are fewer than {WORTH_KEEPING:g}.")
            if mode == "require":
                raise UserError(
                    self.nothing_cached(cached, needs, "The same command with teacher.cache: fill goes on.")
                )
            self.refuse_too_large(needs)
            self.fill(cached, needs)
        note_use(folder.folder / MANIFEST_FILE)
        self.given.console.print(
            f"The teacher is read from {folder.folder} ({folder.size / 1e9:.3g} GB, {folder.dtype}).", highlight=False
        )
        return cached

    def open(self) -> CacheFolder:
        """Return the folder of this teacher, data and dtype; raises UserError for a named one that does not fit."""
        if self.opened is None:
            assert self.config is not None and self.live is not None
            dtype = stored_dtype(self.config, dtype_of(self.live.model))
            identity = self.identity()
            name = fingerprint_json({**identity, "cache_dtype": dtype})
            place = Path(self.config.folder) if self.config.folder else cache_home() / name
            self.opened = CacheFolder(place, identity, dtype)
        return self.opened

    def identity(self) -> dict[str, Any]:
        """Return what a cache belongs to, by names that a message can use."""
        assert self.live is not None
        model: Any = self.live.model
        filler = unusual_padding(model.config, self.given.task, self.given.collator)
        teacher = {
            "teacher": fingerprint_model(model),
            "teacher's class": type(model).__name__,
        }
        padding = {"padding token": filler} if filler is not None else {}
        return teacher | padding | data_identity(self.given.datasets["train"], self.given.tokenizer)

    def length_of(self, training: Mapping[str, Any]) -> tuple[float, int]:
        """Return the passes over the data in a stage and the steps of one, on all processes together."""
        stage = Stage("length", None, nn.ModuleList(), dict(training))
        arguments = stage_arguments(self.given, stage, self.given.folder)
        batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        steps = max(math.ceil(len(self.given.datasets["train"]) / (batch * PartialState().num_processes)), 1)
        epochs = arguments.max_steps / steps if arguments.max_steps > 0 else arguments.num_train_epochs
        return epochs, steps

    # Filling

    def refuse_too_large(self, needs: Needs) -> None:
        """Say what keeping `needs` will take; raises UserError when that is more than the disk or `auto` allows."""
        assert self.config is not None and self.live is not None
        quote = self.quote(needs)
        advice = (
            "Keep less: teacher.cache_dtype: int8 (about half of float16), fewer matched layers (method.layer_map), a "
            "method that reads averages (rail_kd); or name another disk with teacher.cache_folder, or write "
            "teacher.cache: off"
        )
        if quote.needed > SHARE_OF_DISK * quote.free:
            raise UserError(f"The teacher cache needs {quote} at {self.open().folder}. {advice}.")
        if self.config.mode == "auto" and quote.needed > self.config.gb * 1e9:
            raise UserError(
                f"it would need {quote}, and teacher.cache_gb allows {self.config.gb:g}. {advice}, or raise "
                "teacher.cache_gb."
            )
        refuse_a_used_folder(self.open().folder)
        self.given.console.print(f"Caching the teacher in {self.open().folder}: {quote}.", highlight=False)

    def quote(self, needs: Needs) -> Quote:
        """Return what keeping `needs` takes on the disk beyond what is there."""
        assert self.live is not None
        folder = self.open()
        lengths = distinct_lengths(self.given.datasets["train"])
        needed = cached_bytes(needs, self.live.model, folder.dtype, lengths, self.language_model, folder.completed)
        return Quote(needed, free_at(folder.folder))

    def prepare(self, folder: CacheFolder) -> None:
        """Make the folder, once for all processes."""
        if PartialState().is_main_process:
            folder.prepare()
        PartialState().wait_for_everyone()

    def fill(self, cached: CachedTeacher, needs: Needs) -> None:
        """Run the teacher over the training data, each process over its share, and say how long it takes."""
        folder, console = cached.folder, self.given.console
        self.prepare(folder)
        started, done, quoted = time.monotonic(), 0, False
        total = math.ceil(len(self.given.datasets["train"]) / PartialState().num_processes)

        def said(examples: int) -> None:
            nonlocal done, quoted
            done += examples
            seconds = time.monotonic() - started
            if not quoted and seconds > QUOTED_AFTER:
                quoted = True
                console.print(f"Caching takes about {seconds * total / done / 60:.1f} minutes.", highlight=False)

        cached.fill(self.batches(), needs, said)
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            folder.finish(cached.names(needs))
        PartialState().wait_for_everyone()
        folder.refresh()
        console.print(f"Cached {done:,} examples in {time.monotonic() - started:.0f} s.", highlight=False)

    def batches(self) -> Iterator[Batch]:
        """Yield this process's share of the training data, examples of like length together, always in one order."""
        data, device = self.given.datasets["train"], PartialState().device
        size = stage_arguments(self.given, EMPTY, self.given.folder).per_device_train_batch_size
        lengths = torch.tensor([len(ids) for ids in data["input_ids"]])
        order = lengths.argsort(stable=True).tolist()
        starts = range(0, len(order), size)
        for start in list(starts)[PartialState().process_index :: PartialState().num_processes]:
            batch = self.given.collator([data[number] for number in order[start : start + size]])
            yield {
                name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
            }

    def nothing_cached(self, cached: CachedTeacher, needs: Needs, advice: str) -> str:
        """Return the message of `require` without a cache: what is lacking, or what the nearest one differs in."""
        if (cached.folder.folder / MANIFEST_FILE).exists():
            lacking = spoken(name for name in cached.names(needs) if not cached.folder.complete([name]))
            there = spoken(sorted(cached.folder.completed)) or "nothing that is complete"
            return f"teacher.cache is 'require', but {cached.folder.folder} lacks {lacking}; it has {there}. {advice}"
        others = [
            (differences(read_manifest(path)["identity"], cached.folder.identity), path.parent)
            for path in sorted(cache_home().glob(f"*/{MANIFEST_FILE}"))
        ]
        said = ""
        if others:
            differing, nearest = min(others, key=lambda found: found[0].count(" there, "))
            fits = "fits, though: leave teacher.cache_folder out"
            said = f" {nearest} {fits}." if not differing else f" The nearest, {nearest}, differs: {differing}."
        place = cached.folder.folder if self.config is not None and self.config.folder else cache_home()
        return f"teacher.cache is 'require', but there is no cache for this recipe in {place}.{said} {advice}"


EMPTY = Stage("cache", None, nn.ModuleList())

FIRST = "Run `layerdistill cache` with the same recipe first, or write teacher.cache: fill."

QUOTED_AFTER = 3.0
"""Seconds of filling after which its length can be told."""


def cache_home() -> Path:
    """Return the folder of caches that no recipe names."""
    return home() / CACHES


def free_at(place: Path) -> int:
    """Return the free bytes of the disk on which a folder is, or would be made."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def spoken(names: Iterable[str]) -> str:
    """Return the names of signals as a message says them."""
    words = []
    for name in names:
        if name.startswith(TOKENS):
            words.append(f"the {name.removeprefix(TOKENS).split(':')[0]} likeliest tokens")
        elif not name.startswith(LOG_PROBABILITIES):
            words.append(f"layer {name}" if name.isdigit() else name)
    return ", ".join(words)


def stored_dtype(config: CacheConfig, teacher_dtype: str) -> StoredDtype:
    """Return how hidden states are kept: as the recipe says, else in 16 bits, bfloat16 for a teacher of that dtype."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if teacher_dtype == "bfloat16" else "float16"


def dtype_of(model: nn.Module) -> str:
    """Return the name of the dtype of a model's first weight."""
    return str(next(model.parameters()).dtype).rpartition(".")[2]


def data_identity(train: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what a cache belongs to, as far as it is known without the teacher."""
    known = {"tokenizer": fingerprint_tokenizer(tokenizer)}
    if not isinstance(train, Sized):
        return {**known, "data": "any stream"}
    data: Any = train
    return {
        **known,
        "longest example": max(len(ids) for ids in data["input_ids"]),
        "examples": len(data),
        "data": fingerprint_dataset(data.select_columns([name for name in INPUTS if name in data.column_names])),
    }


def refuse_cache_of_other_data(prepared: Prepared) -> None:
    """Raise UserError for a named folder with a cache of other data: before a teacher is fine-tuned in vain."""
    section = prepared.recipe.teacher
    if section is None or section.finetune is None or section.cache == "off" or section.cache_folder is None:
        return
    path = Path(section.cache_folder) / MANIFEST_FILE
    if path.exists() and asking_stages(prepared):
        there, here = read_manifest(path)["identity"], data_identity(prepared.datasets["train"], prepared.tokenizer)
        refuse_another(path.parent, {name: there.get(name) for name in here}, here)


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Return the fingerprint of what a tokenizer makes of text: its vocabulary and its class."""
    return fingerprint_json([type(tokenizer).__name__, tokenizer.get_vocab()]) if tokenizer is not None else ""


def refuse_padding(needs: Needs) -> None:
    """Raise UserError where what the teacher says of padding is read: it depends on the batch, and is not kept."""
    if needs.teacher_padding:
        raise UserError(
            "The method counts padding, and what the teacher says of padding is not kept, for it depends on the other "
            "texts of a batch. Write teacher.cache: off, or leave out the option that counts padding."
        )
