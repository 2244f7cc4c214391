"""Which blocks a student can best do without, and how many go in each round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from layerdistill.core.errors import UserError
from layerdistill.core.types import Pair, RunContext
from layerdistill.models import depths
from layerdistill.signals.importance import IMPORTANCE, ONE_OUT, one_out_kl
from layerdistill.signals.skip import skipped

Importance = Literal[
    "one_out_loss", "one_out_kl", "task_metric", "block_influence", "angular_distance", "cka_redundancy"
]


def rounds(removed: int, per_round: int, iterative: bool) -> list[int]:
    """Return how many blocks go in each round; all at once where the ranking is made once."""
    if not iterative:
        return [removed]
    whole, rest = divmod(removed, per_round)
    return [per_round] * whole + ([rest] if rest else [])


def candidates(criterion: Importance, depth: int, plan: Sequence[int]) -> int:
    """Return how many one-out candidates are evaluated in all; 36 blocks down to 24, one by one, are 366.

    Criteria that see all blocks in one pass evaluate none.
    """
    if criterion not in (*ONE_OUT, "task_metric"):
        return 0
    return sum(depth - sum(plan[:number]) for number in range(len(plan)))


def importances(criterion: Importance, pair: Pair, context: RunContext) -> list[float]:
    """Return one number per block of the student as it is now, higher = more important.

    `task_metric` is by how much `context.score` falls without the block; `one_out_kl` is measured against the original
    teacher; the others are those of `signals.importance`. Raises UserError for a value that is not finite.
    """
    if criterion == "task_metric":
        whole = context.score(pair.student)
        found = []
        for block in range(depths(pair.student)[""]):
            with skipped(pair.student, [block]):
                found.append(whole - context.score(pair.student))
    elif criterion == "one_out_kl":
        found = one_out_kl(pair.student, pair.task, context.calibration(), reference=pair.teacher)
    else:
        found = IMPORTANCE[criterion](pair.student, pair.task, context.calibration())
    if not all(math.isfinite(value) for value in found):
        raise UserError(
            f"The importance of blocks ({criterion}) is not finite: {found}. Check the teacher's weights and the "
            "calibration rows."
        )
    return found


def choose(criterion: Importance, count: int, kept: Sequence[int], pair: Pair, context: RunContext) -> dict[str, Any]:
    """Return one round's decision: the scores, the `count` least important blocks, and what is kept.

    `removed` counts blocks of the student as it was, `removed_original` and `kept_original` those of the teacher. Of
    equally important blocks the lower goes first.
    """
    scores = importances(criterion, pair, context)
    removed = sorted(sorted(range(len(scores)), key=lambda block: scores[block])[:count])
    return {
        "importance": criterion,
        "scores": scores,
        "candidates_evaluated": candidates(criterion, len(kept), [count]),
        "removed": removed,
        "removed_original": [kept[block] for block in removed],
        "kept_original": [original for block, original in enumerate(kept) if block not in removed],
    }
