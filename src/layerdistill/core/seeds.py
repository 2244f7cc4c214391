"""Seeds for named purposes, so that adding a draw somewhere does not change every other draw."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *purpose: object) -> int:
    """Return a seed in [0, 2**31) that depends on `seed` and on the words that say what it is for."""
    text = ":".join([str(seed), *(str(word) for word in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def random_for(seed: int, *purpose: object) -> random.Random:
    """Return Python's generator for one purpose."""
    return random.Random(derive_seed(seed, *purpose))


@contextmanager
def seeded(seed: int, *purpose: object) -> Iterator[None]:
    """Run a block under torch's generator for one purpose and put the generators back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, *purpose))
        yield
