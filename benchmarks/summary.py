"""Figures from blocks: times per step, ratios of blocks that ran one after another, memory, agreement, the study W4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.arms.table import FLOOR, REFERENCE

Results = Mapping[str, Mapping[str, Any]]
"""What was measured of one work: arm -> its blocks, base memory, losses, or why it failed."""


def per_step(result: Mapping[str, Any], clock: str) -> float | None:
    """Return the median over blocks of the seconds per step (`cpu` or `wall`), None for an arm that failed."""
    taken = [block[clock] / block["steps"] for block in result["blocks"]]
    return median(taken) if taken and "failed" not in result else None


def positions_per_step(result: Mapping[str, Any]) -> float | None:
    """Return the positions of a step's batch, padding too, on average; None where the arm makes no batches."""
    steps = sum(block["steps"] for block in result["blocks"])
    positions = sum(block["positions"] for block in result["blocks"])
    return positions / steps if positions else None


@dataclass(frozen=True)
class Ratio:
    """A median over rounds with the smallest and the largest."""

    middle: float
    least: float
    most: float


def ratio(results: Results, name: str, clock: str) -> Ratio | None:
    """Return an arm's time over the reference's, round by round; None where one of them was not measured."""
    ours, reference = results[name], results.get(REFERENCE.name, {"blocks": []})
    if "failed" in ours or not ours["blocks"] or not reference["blocks"]:
        return None
    pairs = zip(ours["blocks"], reference["blocks"], strict=False)
    found = [(one[clock] / one["steps"]) / (other[clock] / other["steps"]) for one, other in pairs]
    return Ratio(median(found), min(found), max(found))


def peak_over_base(result: Mapping[str, Any]) -> float | None:
    """Return the largest peak of all blocks over the memory after loading, in bytes."""
    if "failed" in result or not result["blocks"]:
        return None
    return max(block["peak"] for block in result["blocks"]) - result["base"]


def not_the_students(results: Results, name: str, clock: str) -> float | None:
    """Return the share of an arm's step beyond the floor, 0 for an arm below it.

    None where the arm's batches are others than the floor's, which are the reference's.
    """
    theirs, reference = (positions_per_step(results[of]) if of in results else None for of in (name, REFERENCE.name))
    if theirs is not None and theirs != reference:
        return None
    ours, floor = ratio(results, name, clock), ratio(results, FLOOR.name, clock) if FLOOR.name in results else None
    if ours is None or floor is None:
        return None
    return max(0.0, 1 - floor.middle / ours.middle)


def share_of_part(result: Mapping[str, Any], part: str) -> float | None:
    """Return the share of a step's processor time that a part of it took; None for an arm that does not count it.

    The first of several blocks is left out: there layerdistill measures each term's gradient by itself once, and the
    student's backward of that would be the hidden terms'.
    """
    name = f"cpu of {part}"
    blocks = result["blocks"][1:] or result["blocks"]
    found = [block[name] / block["cpu"] for block in blocks if name in block]
    return median(found) if found and "failed" not in result else None


PLAIN = "W4-kd"
"""The work that has no hidden terms and is else that of W1 and W2."""


def hidden_share(works: Mapping[str, Results], work: str, arm: str) -> float | None:
    """Return the share of an arm's step on a work that it does not take without hidden terms; None if not measured."""
    plain = arm.removesuffix(", float32")  # without hidden terms there is no such arm
    steps = [
        per_step(works[at][of], "cpu") if of in works.get(at, {}) else None for at, of in ((work, arm), (PLAIN, plain))
    ]
    if steps[0] is None or steps[1] is None:
        return None
    return 1 - steps[1] / steps[0]


def disagreements(results: Results, name: str) -> list[str]:
    """Return how the first losses of an arm differ from the reference's, in words.

    By more than its tolerance, or because they cannot be compared.
    """
    ours, reference = results[name].get("losses", {}), results.get(REFERENCE.name, {}).get("losses", {})
    found, compared = [], set[str]()
    for term, value in ours.items():
        parts = term.split(" + ")
        if not all(part in reference for part in parts):
            continue
        compared.update(parts)
        expected = sum(reference[part] for part in parts)
        if not abs(value - expected) <= results[name]["tolerance"] * max(abs(expected), 1e-6):  # also where it is NaN
            found.append(f"{term} {value:.4g}, not {expected:.4g}")
    if lacking := [term for term in reference if term not in compared]:
        found.append(f"{', '.join(lacking)} not compared")
    return found


STUDY_METHODS = {"kd": "W4-kd", "ild": "W1", "ild, cosine": "W4-cosine", "cka": "W2"}
"""The methods of the study W4 and the works that measure them."""
STUDY_SEEDS, STUDY_EPOCHS, STUDY_EXAMPLES, STUDY_BATCH = 5, 3, 67_349, 32
STUDY_STEPS = -(-STUDY_EXAMPLES // STUDY_BATCH)
"""Steps of one pass over SST-2's train split."""


@dataclass(frozen=True)
class Way:
    """A way to do the study: the arm of its steps, and (`first`) that of the first of all passes if it is another."""

    arm: str
    first: str | None = None

    @property
    def name(self) -> str:
        """The way in words."""
        return self.arm if self.first is None else f"{self.arm}, after one pass of {self.first}"


WAYS = (
    Way(REFERENCE.name),
    Way("Trainer subclass"),
    Way("layerdistill"),
    Way("layerdistill, best"),
    Way("layerdistill, cached", "layerdistill, first pass"),
)


STUDY_RUN_WAYS = (REFERENCE.name, "layerdistill", "layerdistill, best", "layerdistill, cached")
"""The ways in which the study is run on few examples."""


def study_seconds(works: Mapping[str, Results], way: Way, clock: str) -> float | None:
    """Return the seconds of the whole study, computed from medians per step; None where a part was not measured.

    Every method, seed and epoch is a pass. The first pass of the first method that matches hidden states is one of
    `way.first`, where there is one: it fills a cache that all other passes read.
    """
    total = 0.0
    for work in STUDY_METHODS.values():
        step = per_step(works[work][way.arm], clock) if way.arm in works.get(work, {}) else None
        if step is None:
            return None
        total += step * STUDY_STEPS * STUDY_SEEDS * STUDY_EPOCHS
    if way.first is None:
        return total
    filled = works[STUDY_METHODS["ild"]]
    first = per_step(filled[way.first], clock) if way.first in filled else None
    later = per_step(filled[way.arm], clock)
    return None if first is None or later is None else total + (first - later) * STUDY_STEPS
