"""The recipe section of task-aware distillation, and what can be wrong with it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from layerdistill.core.types import Pair, StackName
from layerdistill.matching.filters import FilterInit
from layerdistill.methods.matched import TokensConfig, matched_problems
from layerdistill.methods.phase import PhaseTraining, phase_problems
from layerdistill.methods.predictions import predictions_problems


class StageOneConfig(PhaseTraining):
    """How filters are learned: training arguments (the recipe's where left out), and how the frozen model is run."""

    dropout: bool = False
    """Whether the frozen model, and the heads, have dropout, as in the released code; it is run at every step then."""

    record_gb: float = Field(16.0, ge=0)
    """Largest record of hidden states, in GB (10^9 bytes); above it the frozen model is run at every step."""

    teacher: PhaseTraining | None = None
    """What is different for the teacher's filters: the same keys, without dropout, record_gb and teacher."""


class TedConfig(TokensConfig):
    """`method: {name: ted, ...}`."""

    name: Literal["ted"] = "ted"

    filters: Literal["learned", "unlearned", "none"] = "learned"
    """learned: on the task first (TED); unlearned: random ones on both sides; none: the teacher's raw states (LWD)."""

    filter_size: PositiveInt | None = None
    """Width of what filters give; the teacher's hidden size when left out."""

    filter_init: FilterInit | None = None
    """normal: N(0, 0.02^2), bias 0; identity: changes nothing; left out: identity for learned linear filters of a
    language model, else normal."""

    nonlinear: bool = False
    """Whether a filter is Linear - GELU - Linear instead of one Linear."""

    finetune_student_first: bool | None = None
    """Whether the student is first fitted to the task without the teacher; when left out, for learned filters only."""

    student_finetune: PhaseTraining | None = None
    """What that first stage changes in the recipe's training section."""

    stage_one: StageOneConfig = StageOneConfig()
    """How learned filters are learned."""

    mask_padding: bool = True
    """Whether padding is left out of the hidden loss; false averages over it too, as the released code does."""

    relative: bool = False
    """Whether a pair's error is divided by the mean square of the teacher's filtered states."""

    @property
    def finetunes_student(self) -> bool:
        """Whether the student is fitted to the task before anything else."""
        return self.filters == "learned" if self.finetune_student_first is None else self.finetune_student_first

    def size(self, pair: Pair, stack: StackName) -> int:
        """Return the width of what the filters of a stack give."""
        return self.filter_size or pair.teacher_width[stack]

    def init(self, task: str) -> FilterInit:
        """Return how filters start."""
        tuned_lens = task == "causal-lm" and self.filters == "learned" and not self.nonlinear
        return self.filter_init or ("identity" if tuned_lens else "normal")


def ted_problems(config: TedConfig, pair: Pair) -> list[str]:
    """Return one sentence per reason why `config` cannot work on this pair."""
    problems = [
        *phase_problems(config.stage_one, "method.stage_one"),
        *phase_problems(config.stage_one.teacher, "method.stage_one.teacher"),
        *phase_problems(config.student_finetune, "method.student_finetune"),
    ]
    if config.filters == "none" and config.finetunes_student and not config.weights.hidden:
        # kd from a fine-tuned student, a control: no layers are matched.
        return [*problems, *predictions_problems(config, pair)]
    problems += matched_problems(config, pair)
    for stack in pair.student_width:
        if stack in pair.teacher_width:
            problems += width_problems(config, pair, stack)
    return problems


def width_problems(config: TedConfig, pair: Pair, stack: StackName) -> list[str]:
    """Return why the filters of a stack do not fit the models' widths."""
    size, student, teacher = config.size(pair, stack), pair.student_width[stack], pair.teacher_width[stack]
    given = f"the student{f' ({stack})' if stack else ''} is {student} wide, the teacher {teacher}, the filters {size}"
    filtered = {student} if config.filters == "none" else {student, teacher}
    if config.filters == "none" and size != teacher:
        return [
            "method.filters is 'none', so the student's states are compared with the teacher's own, but "
            f"{given}. Leave method.filter_size out."
        ]
    if config.filters == "learned" and pair.task == "causal-lm" and filtered != {size}:
        return [
            "The filters of a language model are learned through its own final norm and head, so what they give must "
            f"be as wide as the model, but {given}. Take a student of the teacher's width (and leave "
            "method.filter_size out), or write method.filters: unlearned or none."
        ]
    if config.init(pair.task) == "identity" and config.nonlinear:
        return ["method.filter_init is 'identity', but a nonlinear filter is none. Leave one of the two out."]
    if config.init(pair.task) == "identity" and filtered != {size}:
        return [f"method.filter_init is 'identity', which needs equal widths, but {given}. Write filter_init: normal."]
    return []
