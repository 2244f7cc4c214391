"""What terms will read of the teacher during a whole training, so that it can be kept before it begins."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from layerdistill.core.types import Needs, Progress

LOOKED_AT = 2000
"""Epochs, and steps, of which each is asked; a map that is drawn anew for each has named every layer long before."""


def needs_during(terms: Iterable[Any], epochs: int, steps_per_epoch: int) -> Needs:
    """Return everything that `terms` will read in `epochs` passes; maps may be drawn anew for each epoch or step."""
    needs = Needs()
    for term in terms:
        first = term.needs(Progress())
        needs |= first
        starts = (Progress(epoch, epoch * steps_per_epoch) for epoch in range(min(epochs, LOOKED_AT)))
        steps = (Progress(step // max(steps_per_epoch, 1), step) for step in range(epochs * steps_per_epoch))
        for progress in (*starts, *islice(steps, LOOKED_AT)):
            found = term.needs(progress)
            needs = needs if found == first else needs | found
    return needs
