"""The order of training examples: a function of the seed and the epoch only, so that a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from layerdistill.core.seeds import derive_seed

MEGABATCHES = 50
"""Batches that are sorted by length together; transformers' own number."""


class EpochSampler(Sampler[int]):
    """A permutation per epoch, optionally with examples of similar length next to each other.

    transformers' LengthGroupedSampler draws from the global generator, whose state in the middle of an epoch is not
    the one the epoch began with, so a resumed run would see another order.
    """

    def __init__(self, size: int, seed: int, lengths: Sequence[int] | None = None, batch_size: int = 1) -> None:
        self.size = size
        self.seed = seed
        self.lengths = lengths
        self.batch_size = batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; accelerate calls this at the beginning of each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        return iter(order if self.lengths is None else self.grouped(order, self.lengths, generator))

    def grouped(self, order: list[int], lengths: Sequence[int], generator: torch.Generator) -> list[int]:
        """Sort pieces of MEGABATCHES batches by length, then shuffle the batches so that lengths do not fall."""
        piece = self.batch_size * MEGABATCHES
        batches: list[list[int]] = []
        for start in range(0, len(order), piece):
            chunk = sorted(order[start : start + piece], key=lambda index: lengths[index], reverse=True)
            batches += [chunk[at : at + self.batch_size] for at in range(0, len(chunk), self.batch_size)]
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        shuffled = [batches[at] for at in torch.randperm(len(batches), generator=generator).tolist()]
        return [index for batch in [*shuffled, *last] for index in batch]
