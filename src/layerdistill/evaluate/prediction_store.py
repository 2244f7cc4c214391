"""What a model said of a dataset, kept under the content of both, so that the runs of one teacher ask it once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from layerdistill.core.errors import UserError
from layerdistill.core.files import write_text
from layerdistill.core.fingerprint import fingerprint_files, fingerprint_json
from layerdistill.core.home import PREDICTIONS, home, note_use
from layerdistill.evaluate.predictions import save_predictions


def kept_predictions(identity: Mapping[str, Any], ask: Callable[[], pa.Table]) -> pa.Table:
    """Return the table of predictions kept under `identity` in the home folder, else what `ask` says, and keep it.

    A file whose bytes are not those that were written is made anew; a folder that cannot be written keeps nothing.
    """
    name = fingerprint_json(identity)
    table, checksum = (home() / PREDICTIONS / f"{name}{ending}" for ending in (".parquet", ".sha256"))
    try:
        if checksum.read_text(encoding="utf-8") == fingerprint_files([table]):
            note_use(checksum)
            return pq.read_table(table)
    except (OSError, UnicodeDecodeError):
        pass  # not kept yet, or broken: the model is asked
    said = ask()
    try:
        save_predictions(said, table)
        write_text(checksum, fingerprint_files([table]))
    except (OSError, UserError):
        return said  # keeping them saves time and is nothing that a run depends on
    return said
