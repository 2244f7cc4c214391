"""The teacher of a stream of examples: read where an example was seen before, else run, and kept as it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from layerdistill.core.errors import UserError
from layerdistill.core.types import Batch, Needs, Signal
from layerdistill.signals.cached_teacher import CachedTeacher, Filler
from layerdistill.signals.row_keys import row_keys


class StreamedTeacher:
    """What a teacher says about examples that come one after another, no one knows which or how many.

    A batch whose examples are all in the folder is read, any other is run and kept, a shard at a time, while `room`
    says that there is some for that many bytes. A kill loses the shard in work; `close` writes what is waiting. What is
    run is the live teacher's signal to the last bit, what is read is rounded to the folder's dtype.
    """

    def __init__(self, cached: CachedTeacher, room: Callable[[int], bool]) -> None:
        self.cached = cached
        self.model = cached.model
        self.room = room
        self.full = False
        self.fillers: dict[Needs, Filler] = {}

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """Return the teacher's signal on a batch; raises UserError where it may only be read and is not there."""
        cached, names = self.cached, self.cached.names(needs)
        keys = row_keys(batch)
        if self.waits(names, keys):
            self.close()  # a new pass over a stream that is shorter than a shard
        if cached.folder.has(names, keys):
            return cached.signal(batch, needs)
        if cached.only_cached:
            raise UserError(
                f"teacher.cache is 'require', but the cache in {cached.folder.folder} lacks some examples of the "
                "stream. Keep them in a run with mode fill first, or take mode off."
            )
        if self.full:
            return cached.live.signal(batch, needs)
        said = cached.live.signal(batch, needs | cached.among(needs, names))
        filler = self.fillers.setdefault(needs, Filler(cached, needs))
        filler.keep(keys, replace(said, logits=None) if cached.head is not None else said)
        self.full = not self.room(sum(each.size for each in self.fillers.values()))
        return said

    def waits(self, names: Sequence[str], keys: Sequence[bytes]) -> bool:
        """Return whether all examples are there but for the writing."""
        waiting = set().union(*(filler.waiting for filler in self.fillers.values()))
        new = [key for key in keys if not self.cached.folder.has(names, [key])]
        return bool(new) and waiting.issuperset(new)

    def close(self) -> None:
        """Write what is waiting."""
        for filler in self.fillers.values():
            filler.close()
