"""How long a forward takes, measured so that a noisy machine treats all models alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

MAX_ROUNDS = 200
"""Timed forwards per model, at most; by then the median of a fast model has settled."""

WARM_UP_ROUNDS = 3
"""Forwards before the clock counts: caches fill, kernels are chosen, memory is reserved."""


def interleaved_latency(forwards: Mapping[str, Callable[[], None]], seconds: float = 2.0) -> dict[str, float]:
    """Return the median time of each forward in milliseconds, the forwards taken in turn: A B A B ...

    Each call has to return only when its work is done. Warm-up takes at most a quarter of the time, then rounds go on
    until `seconds` per model are spent (or `MAX_ROUNDS`); a round that has begun is finished, so a slow model takes
    longer, and its median may be of one forward.
    """
    budget = seconds * len(forwards)
    _rounds(forwards, budget / 4, WARM_UP_ROUNDS)
    taken = _rounds(forwards, budget, MAX_ROUNDS)
    return {name: 1000.0 * statistics.median(times) for name, times in taken.items()}


def _rounds(forwards: Mapping[str, Callable[[], None]], seconds: float, rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in forwards}
    begin = time.perf_counter()
    for _ in range(rounds):
        for name, forward in forwards.items():
            start = time.perf_counter()
            forward()
            taken[name].append(time.perf_counter() - start)
        if time.perf_counter() - begin >= seconds:
            break
    return taken
