"""The teacher of a stream of examples: read where an example was seen before, else run, and kept as it goes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from layerdistill.core.errors import UserError
from layerdistill.core.types import Batch, Needs, Signal
from layerdistill.signals.cached_teacher import CachedTeacher, Filler
from layerdistill.signals.row_keys import row_keys

logger = logging.getLogger(__name__)


class StreamedTeacher:
    """What a teacher says about examples that come one after another, no one knows which or how many.

    A batch whose examples are all in the folder is read, any other is run, and what `needs` asks for is kept, a shard
    at a time, until the folder holds `most` bytes. What is run is the live teacher's signal to the last bit, what is
    read is rounded to the folder's dtype. A kill loses the shard in work; `close` writes it. Where the disk refuses, a
    warning says so and the teacher is run from then on.
    """

    def __init__(self, cached: CachedTeacher, needs: Needs, most: float) -> None:
        self.cached = cached
        self.model = cached.model
        self.needs = needs
        self.names = cached.names(needs)
        self.most = most
        self.filler = Filler(cached, needs)
        self.full = False

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """Return the teacher's signal on a batch; raises UserError where it may only be read and is not there."""
        cached, names, keys = self.cached, self.cached.names(needs), row_keys(batch)
        if self.waits(keys):
            self.close()  # a new pass over a stream that is shorter than a shard
        if cached.folder.has(names, keys):
            return cached.signal(batch, needs)
        if cached.only_cached:
            raise UserError(
                f"teacher.cache is 'require', but the cache in {cached.folder.folder} lacks some examples of the "
                "stream. Keep them in a run with mode fill first, or take mode off."
            )
        if self.full or not set(names) <= set(self.names):
            return cached.live.signal(batch, needs)
        said = cached.live.signal(batch, needs | cached.among(self.needs, self.names))
        self.keep(keys, said)
        return said

    def keep(self, keys: Sequence[bytes], said: Signal) -> None:
        """Keep a signal where there is room; of a language model the last states stand for the logits."""
        if self.cached.folder.size + self.filler.size > self.most:
            self.stop(f"it may hold {self.most / 1e9:.3g} GB")
            return
        try:
            by_head = said.logits is not None and self.cached.head is not None
            self.filler.keep(keys, replace(said, logits=None) if by_head else said)
        except UserError as error:
            self.stop(" ".join(error.problems))

    def waits(self, keys: Sequence[bytes]) -> bool:
        """Return whether all examples are known and some of them are not written yet."""
        waiting = self.filler.waiting
        there = self.cached.folder.has
        return any(key in waiting for key in keys) and all(key in waiting or there(self.names, [key]) for key in keys)

    def stop(self, why: str) -> None:
        """Keep nothing more, and say so."""
        self.full = True
        logger.warning(
            "No more of the teacher is kept in %s: %s. It is run for examples that are not there.",
            self.cached.folder.folder, why,
        )  # fmt: skip
        self.close()

    def close(self) -> None:
        """Write what is waiting; where that fails, it is given up with a warning."""
        try:
            self.filler.close()
        except UserError as error:
            logger.warning("What the teacher said last is not kept: %s", " ".join(error.problems))
            self.filler = Filler(self.cached, self.needs)
