"""The folder in which things are kept that several runs share: fine-tuned teachers and what teachers said."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Return `$LAYERDISTILL_HOME`, else `~/.cache/layerdistill`."""
    given = os.environ.get("LAYERDISTILL_HOME")
    return Path(given) if given else Path.home() / ".cache" / "layerdistill"
