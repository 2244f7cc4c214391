"""Training data without a length: one pass that never ends, the same for every number of processes and after a stop."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import count
from typing import Any

import datasets
from torch.utils.data import IterableDataset, get_worker_info
from transformers import TrainingArguments

from layerdistill.core.errors import UserError
from layerdistill.data import all_rows


class Endless(IterableDataset):
    """A stream, again and again; no batch knows where one pass over it ends, so none is cut short there.

    A resumed run reads what came before its checkpoint once more and leaves it out, whatever pass it was in.
    `set_epoch`, where the stream has it, is told the number of the pass.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        """Yield rows for ever; raises UserError for a stream that has none, or none a second time."""
        for number in count():
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(number)
            rows = 0
            for row in one_pass(self.stream):
                rows += 1
                yield row
            worker = get_worker_info()
            if rows == 0 and worker is not None and worker.id > 0:
                return  # fewer shards than workers: this one has nothing to do
            if rows == 0:
                when = " a second time" if number else ""
                raise UserError(
                    f"train_dataset, a {type(self.stream).__name__}, gives no example{when}. Pass one whose every "
                    "iteration begins anew, or fewer max_steps."
                )


def one_pass(stream: Any) -> Iterator[Any]:
    """Yield the rows of a stream; a data-loader worker yields its share of them.

    A `datasets` stream of one shard cannot be shared: the first worker reads it, in the order it has without workers.
    """
    worker = get_worker_info()
    if worker is None or not isinstance(stream, datasets.IterableDataset) or stream.num_shards > 1:
        yield from stream
    elif worker.id == 0:
        yield from all_rows(stream)


def endless(train_dataset: Any, args: TrainingArguments) -> Any:
    """Return a data set without a length as one that never ends, any other as it is; raises as `refuse_unending` does.

    Each process then reads the stream and takes its share: accelerate's dispatching cannot, for batches differ in
    length.
    """
    refuse_unending(train_dataset, args)
    if train_dataset is None or isinstance(train_dataset, Sized):
        return train_dataset
    config: Any = args.accelerator_config
    config.dispatch_batches = False
    return Endless(train_dataset)


def refuse_unending(train_dataset: Any, args: TrainingArguments | None) -> None:
    """Raise UserError for a data set without a length where the number of steps is not given."""
    unending = train_dataset is not None and not isinstance(train_dataset, Sized)
    if unending and (args is None or args.max_steps <= 0):
        raise UserError(
            f"train_dataset is a {type(train_dataset).__name__}, which has no length, so the number of steps must be "
            "given: args.max_steps."
        )
