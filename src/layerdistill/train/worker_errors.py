"""What a data-loader worker refuses, said as the main process would have said it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from layerdistill.core.errors import UserError

RAISED = f"{UserError.__module__}.{UserError.__qualname__}: "
"""What a traceback puts in front of a message."""


@contextmanager
def plain_worker_errors() -> Iterator[None]:
    """Raise a UserError of a data-loader worker with its own message: torch puts the worker's traceback into it."""
    try:
        yield
    except UserError as error:
        wrapped, message = str(error).rpartition(RAISED)[::2]
        if "DataLoader worker" not in wrapped:
            raise
        raise UserError(message.strip()) from error
