"""Files that are either whole or not there: everything is written beside its place and renamed into it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from layerdistill.core.errors import UserError

READABLE = 0o644
"""The mode of what is written: safetensors and tempfile leave their files to the owner alone, others share them."""

PARTIAL_PREFIX = ".partial-"
"""Names that begin so are unfinished; any command may delete them."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` so that a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=PARTIAL_PREFIX, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, READABLE)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN is refused because JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UserError that names the file when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}). Delete it to have it made again.") from error


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends without an exception, replacing an older one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else READABLE)
        sync_folder(temporary)
        replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`; an older `target` is moved aside first, put back on failure, and deleted last."""
    aside = target.with_name(f"{PARTIAL_PREFIX}old-{os.getpid()}-{target.name}")
    if target.exists():
        os.replace(target, aside)
    try:
        os.replace(source, target)
    except OSError:
        if aside.exists():
            os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Ask the operating system to put every file below `folder` on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def sweep_partials(folder: Path) -> None:
    """Delete what a killed command left unfinished in `folder` (not below it)."""
    for path in folder.glob(f"{PARTIAL_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def explained_disk_errors(what: str, where: Path, elsewhere: str = "with --set output=FOLDER") -> Iterator[None]:
    """Turn a full disk or a folder that cannot be written, inside the block, into a UserError that says which.

    `elsewhere` says how another folder is chosen; torch and safetensors report a failed write by errors of their own.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{what} cannot be written to {where}: {reason}. What was there before is untouched. "
            f"Free space or choose another folder {elsewhere}, then give the same command again."
        ) from error
