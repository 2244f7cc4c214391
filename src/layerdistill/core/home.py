"""The folder in which things are kept that several runs share: fine-tuned teachers and what teachers said."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

TEACHERS, CACHES, PREDICTIONS = "teachers", "cache", "predictions"
"""The parts of the home folder."""

MADE_FROM = "made_from.json"
"""In the folder of a fine-tuned teacher: what it was made from."""


def home() -> Path:
    """Return `$LAYERDISTILL_HOME`, else `~/.cache/layerdistill`."""
    given = os.environ.get("LAYERDISTILL_HOME")
    return Path(given) if given else Path.home() / ".cache" / "layerdistill"


def note_use(file: Path) -> None:
    """Touch a file of something kept, so that `layerdistill kept` knows when it was last used; a failure is nothing."""
    with suppress(OSError):
        os.utime(file)
