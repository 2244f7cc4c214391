"""Lock files: who holds them, and who does not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from layerdistill.core.errors import UserError
from layerdistill.core.processes import file_lock, held


def test_a_second_command_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    with (
        held(tmp_path / ".lock", "The run folder", wait=False),
        pytest.raises(UserError, match="Another command is working"),
        held(tmp_path / ".lock", "The run folder", wait=False),
    ):
        pass
    with held(tmp_path / ".lock", "The run folder", wait=False):
        pass


def test_a_worker_that_outlives_a_command_does_not_hold_its_lock(tmp_path: Path) -> None:
    """Without the hook the child has the open file, and with it the lock."""
    with file_lock(tmp_path / ".lock", "The run folder"):
        started, said = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(said, b".")
            signal.pause()
        os.read(started, 1)
        with pytest.raises(BlockingIOError), file_lock(tmp_path / ".lock", "The run folder", wait=False):
            pass
    try:
        with file_lock(tmp_path / ".lock", "The run folder", wait=False):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
