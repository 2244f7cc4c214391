"""Every row of a `datasets` stream, also in a data-loader worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import IterableDataset


def all_rows(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    """Yield every row of a stream, in the order it has in the main process.

    A plain loop gives a data-loader worker the rows of the worker's own files alone, and shuffles in another order.
    """
    for batch in stream.iter(batch_size=1):
        yield {name: values[0] for name, values in batch.items()}
