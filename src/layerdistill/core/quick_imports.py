"""Imports without the garbage collector: torch and transformers make a million objects that stay to the end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import in this block what a command needs; what is there at its end is not looked at by the collector again.

    Collecting while importing, and once more over all of it when the process ends, took a third of the time of a
    command that does little else; and accelerate collects twice whenever a model is trained.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
