"""What the stages of a recipe will read of its teacher, as far as it is known before any training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from layerdistill.core.types import Needs
from layerdistill.prepare import Prepared, with_shapes


@dataclass(frozen=True)
class AskingStage:
    """What a stage will read of the teacher, and its passes over the data on one process.

    Where not `certain`, which layers it reads is chosen while the method runs, and `needs` are those of some choice.
    """

    needs: Needs
    passes: float
    certain: bool


def asking_stages(prepared: Prepared) -> list[AskingStage]:
    """Return the stages that read something of the recipe's teacher, as far as they are known before any training."""
    pair = with_shapes(prepared.pair, prepared.teacher_config, prepared.student_config, prepared.labels)
    found = []
    for stage in prepared.method.preview(pair, prepared.recipe.method):
        if stage.asks is not None and stage.training is not None:
            changed = replace(prepared, arguments=prepared.arguments_with(stage.training))
            arguments, steps = changed.arguments, changed.steps_per_epoch
            passes = arguments.max_steps / steps if arguments.max_steps > 0 else arguments.num_train_epochs
            needs = stage.asks(math.ceil(changed.total_steps / steps), steps)
            layers = needs.teacher or needs.teacher_taps or needs.teacher_averages
            if needs.teacher_at_all:
                found.append(AskingStage(needs, passes, not (stage.chosen_later and layers)))
    return found


def needs_of(stages: Iterable[AskingStage]) -> Needs:
    """Return what stages read of the teacher, all together."""
    needs = Needs()
    for stage in stages:
        needs |= stage.needs
    return needs
