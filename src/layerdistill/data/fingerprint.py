"""The fingerprint of a data set's content, for caches that must notice other data."""

from __future__ import annotations

import hashlib

import pyarrow as pa
from datasets import Dataset

from layerdistill.core.fingerprint import LENGTH


class _HashSink:
    """A file to write to that keeps only a digest."""

    closed = False

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Take more bytes into the digest."""
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back, so nothing has to be written."""

    def close(self) -> None:
        """There is nothing to close."""


def fingerprint_dataset(dataset: Dataset) -> str:
    """Return the fingerprint of column names, types and values (in order), whatever the chunks they are stored in."""
    table: pa.Table = dataset.with_format("arrow")[:]
    table = table.take(pa.array(range(len(dataset)), pa.int64())).combine_chunks()  # a slice keeps traces of its origin
    sink = _HashSink()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), table.schema) as writer:
        writer.write_table(table)
    return sink.digest.hexdigest()[:LENGTH]
