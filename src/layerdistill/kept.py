"""`layerdistill kept`: what runs have kept for later ones in the home folder, listed and deleted."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from layerdistill.core.errors import UserError, did_you_mean
from layerdistill.core.files import PARTIAL_PREFIX
from layerdistill.core.home import CACHES, MADE_FROM, PREDICTIONS, TEACHERS, home
from layerdistill.core.processes import file_lock

KINDS = {TEACHERS: "fine-tuned teacher", CACHES: "teacher cache", PREDICTIONS: "predictions"}
"""The home folder's parts and what an entry of each is called."""

BESIDE = {".work", ".parquet", ".sha256"}
"""What the names of files and folders of one entry end with."""

DAY = 86_400.0


@dataclass(frozen=True)
class Kept:
    """An entry: its kind in words, its name, its files and folders, their bytes, and when it was last used (seconds).

    What is used is touched (`note_use`), so that this is the time of the newest file.
    """

    kind: str
    name: str
    paths: tuple[Path, ...]
    bytes: int
    used: float
    about: str


def list_kept() -> list[Kept]:
    """Return everything that is kept, what was used last first."""
    found = []
    for part, kind in KINDS.items():
        names: dict[str, list[Path]] = {}
        for path in sorted((home() / part).glob("[!.]*")):
            name = path.stem if path.suffix in BESIDE else path.name
            if path.suffix != ".lock":
                names.setdefault(name, []).append(path)
        for name, paths in names.items():
            if files := states_of(paths):
                size, used = sum(state.st_size for state in files), max(state.st_mtime for state in files)
                found.append(Kept(kind, name, tuple(paths), size, used, about(paths)))
    return sorted(found, key=lambda entry: -entry.used)


def states_of(paths: Iterable[Path]) -> list[os.stat_result]:
    """Return the size and time of each file among paths and below them; what a run takes away meanwhile is left out."""
    found = []
    for path in paths:
        below = (Path(root, name) for root, _, names in os.walk(path) for name in names)
        for file in [path] if path.is_file() else below:
            with suppress(FileNotFoundError):
                found.append(file.stat())
    return found


def about(paths: Iterable[Path]) -> str:
    """Return what a fine-tuned teacher was made of, empty for anything else."""
    for path in paths:
        note = path / MADE_FROM
        if note.is_file():
            with suppress(OSError, ValueError, KeyError, AttributeError):
                model = json.loads(note.read_text(encoding="utf-8"))["model"]
                return model if isinstance(model, str) else str(model.get("model_type", ""))
    return ""


def kept_table(entries: Sequence[Kept]) -> Table:
    """Return entries as a table for the terminal."""
    size = sum(entry.bytes for entry in entries)
    table = Table(title=f"{home()}: {size / 1e9:.3g} GB", title_justify="left")
    table.add_column("")
    table.add_column("name", no_wrap=True, min_width=max((len(entry.name) for entry in entries), default=0))
    table.add_column("MB", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    table.add_column("of", overflow="fold")
    for entry in entries:
        used = f"{datetime.fromtimestamp(entry.used):%Y-%m-%d %H:%M}"
        table.add_row(entry.kind, entry.name, f"{entry.bytes / 1e6:,.1f}", used, escape(entry.about))
    return table


def delete_kept(names: Sequence[str] = (), unused_days: float | None = None) -> list[Kept]:
    """Delete the named entries and those that were not used for so many days, and return them.

    Raises UserError for a name that nothing has, before anything is deleted.
    """
    there = list_kept()
    known = {entry.name for entry in there}
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"Nothing in {home()} is called {', '.join(unknown)}.{did_you_mean(unknown[0], sorted(known))} "
            "`layerdistill kept` lists what there is."
        )
    before = time.time() - unused_days * DAY if unused_days is not None else 0.0
    gone = [entry for entry in there if entry.name in names or entry.used < before]
    for entry in gone:
        for path in entry.paths:
            delete(path, path.with_name(f"{entry.name}.lock"))
    return gone


def delete(path: Path, lock: Path) -> None:
    """Delete a file or a folder as a whole: it is renamed first, so that nobody finds half of it.

    Raises UserError for what cannot be deleted, and for a teacher that another command is making.
    """
    try:
        with file_lock(lock, "What is kept", wait=False) if lock.exists() else nullcontext():
            gone = path.with_name(f"{PARTIAL_PREFIX}{uuid.uuid4().hex}")
            path.rename(gone)
            if gone.is_dir():
                shutil.rmtree(gone)
            else:
                gone.unlink()
    except BlockingIOError:
        raise UserError(f"Another command is working on {path}. Wait for it, then delete it.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be deleted: {error.strerror or error}. Look at its permissions.") from error
