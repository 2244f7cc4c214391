"""Fixtures of all tests; what is kept for several runs (teachers, caches) lies in a folder of the session."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from layerdistill.signals import LiveTeacher


@pytest.fixture(scope="session", autouse=True)
def layerdistill_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("LAYERDISTILL_HOME", str(tmp_path_factory.mktemp("home")))
    yield
    patch.undo()


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_the_collectors_sight() -> None:
    """Every `train()` collects garbage twice (accelerate), over all that was ever imported: a third of a tiny run."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def teacher_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of examples each time that the live teacher is run."""
    runs: list[int] = []
    signal = LiveTeacher.signal

    def counted(self: LiveTeacher, batch: Any, needs: Any) -> Any:
        runs.append(len(batch["input_ids"]))
        return signal(self, batch, needs)

    monkeypatch.setattr(LiveTeacher, "signal", counted)
    return runs
