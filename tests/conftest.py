"""What is kept for several runs (fine-tuned teachers, caches) lies in a folder of this test session, not the user's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def layerdistill_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("LAYERDISTILL_HOME", str(tmp_path_factory.mktemp("home")))
    yield
    patch.undo()
