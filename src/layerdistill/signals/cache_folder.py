"""A folder of safetensors shards with what a teacher said, row by row, and a manifest that says what is in them."""

from __future__ import annotations

import json
import os
import re
import uuid
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.files import PARTIAL_PREFIX, READABLE, explained_disk_errors, sweep_partials, write_text
from layerdistill.core.processes import file_lock
from layerdistill.signals.cache_rows import LOG_PROBABILITIES, TOKENS, StoredDtype, decode, encode

MANIFEST_FILE = "manifest.json"
KEY_BYTES = 16
READ_AT_ONCE = 2**24
LOCK = ".lock"
"""The file by which one process at a time changes a folder."""

WHAT = "The teacher cache"
ELSEWHERE = "with teacher.cache_folder"
NOBODYS = ("lost+found",)
"""What a disk has by itself, like names that begin with a dot."""

SHARD = re.compile(r"[0-9a-f]{32}\.safetensors")
"""What shards are called; no other file of that kind is ours to delete."""

UNFINISHED = ".tmp*"
"""What safetensors itself writes into before it renames it; a kill leaves it behind."""

LOGITS = "logits"


@dataclass(frozen=True)
class Place:
    """Where an example's rows of a signal are: `count` rows from `start` of a tensor in a shard."""

    shard: int
    tensor: str
    start: int
    count: int


class CacheFolder:
    """What was said about examples, `(rows, width)` for each of several named signals, in shards that never change.

    An example is known by a key of KEY_BYTES bytes. Shards are written whole and then named in the manifest, under a
    lock, so that several processes may add to one folder, a reader never sees half of one, and a kill loses the shard
    in work and no more. Every file's checksum is compared before its first row is read.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], dtype: StoredDtype) -> None:
        """Open `folder`, or plan to make it; raises UserError when it is another teacher's or data's, or broken.

        `identity` says whose signals these are, by names that a message can use.
        """
        self.folder = folder
        self.identity = json.loads(json.dumps({**identity, "cache_dtype": dtype}, default=str))
        self.dtype = dtype
        self.shards: list[dict[str, Any]] = []
        self.opened: list[Any] = []
        self.tensors: dict[tuple[int, str], Tensor] = {}
        self.places: dict[str, dict[bytes, Place]] = {}
        self.completed: frozenset[str] = frozenset()
        self.refresh()

    # Reading

    def has(self, names: Sequence[str], keys: Sequence[bytes]) -> bool:
        """Return whether every named signal is there for every key."""
        return all(key in self.places.get(name, ()) for name in names for key in keys)

    def complete(self, names: Sequence[str]) -> bool:
        """Return whether the named signals were said to be there for all examples."""
        return self.completed.issuperset(names)

    def rows(self, name: str, key: bytes) -> Tensor:
        """Return an example's rows `(n, width)` of a signal; raises KeyError for what is not there."""
        place = self.places[name][key]
        piece = slice(place.start, place.start + place.count)
        scaled = self.dtype_of(name) == "int8"
        scale = self._tensor(place.shard, f"{place.tensor}.scale")[piece] if scaled else None
        return decode(self._tensor(place.shard, place.tensor)[piece], scale)

    def dtype_of(self, name: str) -> StoredDtype:
        """Return how a signal's numbers are kept: logits, which are few, always in full."""
        if name.startswith((TOKENS, LOG_PROBABILITIES)) and self.dtype != "float32":
            return "float16"
        return "float32" if name == LOGITS else self.dtype

    @property
    def size(self) -> int:
        """The bytes of all shards."""
        return sum(shard["bytes"] for shard in self.shards)

    def refresh(self) -> None:
        """Read what other processes have added; raises UserError for a broken or another manifest or shard."""
        path = self.folder / MANIFEST_FILE
        known = read_manifest(path) if path.exists() else {"identity": self.identity, "shards": [], "complete": []}
        refuse_another(self.folder, known["identity"], self.identity)
        for shard in known["shards"][len(self.shards) :]:
            self._add(shard)
        self.completed = frozenset(known["complete"])

    def _add(self, shard: dict[str, Any]) -> None:
        path = self.folder / shard["file"]
        broken = None
        if not path.exists():
            broken = "is missing"
        elif path.stat().st_size != shard["bytes"] or checksum_of(path) != shard["checksum"]:
            broken = "has changed since it was written"
        if broken:
            raise UserError(
                f"The shard {path} of the teacher cache {broken}, so nothing in that cache can be trusted. Delete the "
                f"folder {self.folder} to have it made again."
            )
        number = len(self.shards)
        self.shards.append(shard)
        self.opened.append(safe_open(path, framework="pt"))
        keys = self._tensor(number, "keys").numpy().tobytes()
        names = [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
        for name, tensor in {**{name: name for name in shard["signals"]}, **shard.get("copies", {})}.items():
            counts = self._tensor(number, f"{tensor}.counts").tolist()
            index, start = self.places.setdefault(name, {}), 0
            for key, count in zip(names, counts, strict=True):
                index.setdefault(key, Place(number, tensor, start, count))
                start += count

    def _tensor(self, shard: int, name: str) -> Tensor:
        # Memory-mapped: no byte is read before a row of it is.
        if (shard, name) not in self.tensors:
            self.tensors[shard, name] = self.opened[shard].get_tensor(name)
        return self.tensors[shard, name]

    # Writing

    def prepare(self) -> None:
        """Make the folder, with an empty manifest, and remove what a killed process left in it.

        Raises UserError for a folder with files of somebody else.
        """
        refuse_a_used_folder(self.folder)
        with explained_disk_errors(WHAT, self.folder, ELSEWHERE), self._locked():
            self.refresh()
            sweep_partials(self.folder)
            known = {shard["file"] for shard in self.shards}
            shards = [path for path in self.folder.glob("*.safetensors") if SHARD.fullmatch(path.name)]
            for path in [*shards, *self.folder.glob(UNFINISHED)]:
                if path.name not in known:
                    path.unlink()
            if not (self.folder / MANIFEST_FILE).exists():
                self._write_manifest()

    def append(self, examples: Mapping[bytes, Mapping[str, Tensor]]) -> None:
        """Add one shard: for each key the rows `(n, width)` of signals, the same names for all of them.

        Examples that another process has added meanwhile are left out. Signals that are one tensor under several names,
        for every key, are written once.
        """
        with explained_disk_errors(WHAT, self.folder, ELSEWHERE), self._locked():
            self.refresh()
            signals = sorted(next(iter(examples.values()))) if examples else []
            new = [key for key in examples if not self.has(signals, [key])]
            if not new:
                return
            name = f"{uuid.uuid4().hex}.safetensors"
            partial = self.folder / f"{PARTIAL_PREFIX}{name}"
            copies = copied_signals(examples, new, signals)
            own = [signal for signal in signals if signal not in copies]
            save_file(self._tensors_of(examples, new, own), partial)
            partial.chmod(READABLE)
            entry = {"file": name, "examples": len(new), "signals": own, "copies": copies}
            entry |= {"bytes": partial.stat().st_size, "checksum": checksum_of(partial)}
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            partial.replace(self.folder / name)
            self._add(entry)
            self._write_manifest()

    def finish(self, names: Sequence[str]) -> None:
        """Note that the named signals are there for all examples."""
        with explained_disk_errors(WHAT, self.folder, ELSEWHERE), self._locked():
            self.refresh()
            self.completed |= frozenset(names)
            self._write_manifest()

    def _tensors_of(
        self, examples: Mapping[bytes, Mapping[str, Tensor]], keys: Sequence[bytes], signals: Sequence[str]
    ) -> dict[str, Tensor]:
        tensors = {"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)}
        for signal in signals:
            rows = [examples[key][signal] for key in keys]
            tensors[f"{signal}.counts"] = torch.tensor([len(each) for each in rows])
            kept, scale = encode(torch.cat(rows), self.dtype_of(signal))
            tensors[signal] = kept.contiguous()
            if scale is not None:
                tensors[f"{signal}.scale"] = scale
        return tensors

    def _write_manifest(self) -> None:
        content = {"identity": self.identity, "shards": self.shards, "complete": sorted(self.completed)}
        write_text(self.folder / MANIFEST_FILE, manifest_text(content))

    def _locked(self) -> AbstractContextManager[None]:
        return file_lock(self.folder / LOCK, WHAT, elsewhere=ELSEWHERE)


def refuse_a_used_folder(folder: Path) -> None:
    """Raise UserError where a folder is no cache and not empty: a broken cache is deleted with its folder."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    # Looked for last: another process may be making this cache, and its shards come after its manifest.
    if (folder / MANIFEST_FILE).exists():
        return
    if others := [name for name in names if not (name.startswith(".") or name in NOBODYS or SHARD.fullmatch(name))]:
        raise UserError(
            f"The teacher cache needs a folder of its own, but {folder} holds other files "
            f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}). Name a new or an empty folder {ELSEWHERE}."
        )


def copied_signals(
    examples: Mapping[bytes, Mapping[str, Tensor]], keys: Sequence[bytes], signals: Sequence[str]
) -> dict[str, str]:
    """Return the signals whose rows are the very tensors of another one for every key, with that other's name."""
    first: dict[tuple[int, ...], str] = {}
    found = {}
    for signal in signals:
        other = first.setdefault(tuple(id(examples[key][signal]) for key in keys), signal)
        if other != signal:
            found[signal] = other
    return found


def manifest_text(content: Mapping[str, Any]) -> str:
    """Return a manifest with its own checksum; the same content gives the same text."""
    inner = json.dumps(content, indent=1, sort_keys=True, default=str)
    return json.dumps({"checksum": zlib.crc32(inner.encode()), "content": json.loads(inner)}, indent=1, sort_keys=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return what a manifest says; raises UserError when a byte of it is not as it was written."""
    given = path.read_bytes()
    try:
        content = json.loads(given)["content"]
        whole = manifest_text(content).encode() == given
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(
            f"The manifest of the teacher cache, {path}, is broken: it is not as it was written. Delete the folder "
            f"{path.parent} to have it made again."
        )
    return content


def checksum_of(path: Path) -> int:
    """Return the CRC-32 of a file: it finds every change of up to 32 bits in a row, at the speed of the disk."""
    found = 0
    with path.open("rb") as stream:
        while piece := stream.read(READ_AT_ONCE):
            found = zlib.crc32(piece, found)
    return found


def refuse_another(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise UserError where the identity of a cache that is there is not the one that is wanted."""
    if differ := differences(there, here):
        raise UserError(
            f"The teacher cache in {folder} was made for something else: {differ}. Choose another folder "
            "(teacher.cache_folder), or delete that one."
        )


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return what two identities differ in, in words, empty if they are equal."""
    names = [name for name in [*here, *(set(there) - set(here))] if there.get(name) != here.get(name)]
    return ", ".join(f"{name} ({there.get(name)!r} there, {here.get(name)!r} here)" for name in names)
