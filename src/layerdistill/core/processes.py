"""Several processes that train one model must take the same decisions."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from layerdistill.core.errors import UserError
from layerdistill.core.files import explained_disk_errors

Value = TypeVar("Value")

HELD: set[IO[str]] = set()
"""The lock files of this process, open."""


def agreed(value: Value) -> Value:
    """Return the main process's value on every process; what one of them sees on the disk, another may see later."""
    return broadcast_object_list([value])[0] if PartialState().num_processes > 1 else value


@contextmanager
def file_lock(path: Path, what: str, wait: bool = True, elsewhere: str = "with --set output=FOLDER") -> Iterator[None]:
    """Hold a lock file in this process; another one waits for it, or gets BlockingIOError."""
    with explained_disk_errors(what, path.parent, elsewhere):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("w")
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        HELD.add(stream)
        try:
            yield
        finally:
            HELD.discard(stream)


def _let_go() -> None:
    # A forked worker of a data loader outlives a killed command for seconds, and with it a lock that it inherited.
    while HELD:
        HELD.pop().close()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def held(path: Path, what: str, wait: bool) -> Iterator[None]:
    """Hold a lock file in the main process; a second command waits for it, or gets a UserError that names `what`."""
    if not PartialState().is_main_process:
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(path, what, wait))
        except BlockingIOError:
            raise UserError(
                f"Another command is working in {path.parent}. Wait for it, or choose another output."
            ) from None
        yield
