"""The types that stations hand to each other: layer references, signals, means and stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor, nn

from layerdistill.core.config import SectionConfig
from layerdistill.core.errors import UserError

Batch = Mapping[str, Tensor]
"""What the collator makes: `input_ids`, `attention_mask`, `labels`, ... each `(batch, ...)`."""

IGNORED_LABEL = -100
"""The label of positions that no loss and no metric counts, as everywhere in transformers."""

StackName = Literal["", "encoder", "decoder"]
"""Which stack of blocks: `""` in a model with one stack, else `encoder` or `decoder`."""

Unit = Literal["example", "token", "decoder_token", "label", "batch"]
"""What a term's count counts: examples, attended tokens (of the encoder or only stack, or of the
decoder), labelled positions, or whole (micro-)batches."""


@dataclass(frozen=True, order=True)
class LayerRef:
    """A layer as in `hidden_states`: 0 = embedding output, k = output of block k, `final` = after the final norm.

    `number` is -1 for `final`. `str()` gives the form used in recipes and logs: `3`, `final`, `encoder.3`.
    """

    stack: StackName
    number: int

    def __str__(self) -> str:
        name = "final" if self.number < 0 else str(self.number)
        return f"{self.stack}.{name}" if self.stack else name

    @classmethod
    def parse(cls, given: int | str | LayerRef) -> LayerRef:
        """Read `3`, `"3"`, `"final"`, `"encoder.3"` or `"decoder.final"`; raises UserError for anything else."""
        if isinstance(given, LayerRef):
            return given
        stack, _, name = str(given).rpartition(".")
        if stack in ("", "encoder", "decoder"):
            if name == "final":
                return cls(stack, -1)  # type: ignore[arg-type]
            if name.isdecimal():
                return cls(stack, int(name))  # type: ignore[arg-type]
        raise UserError(
            f"layer {given!r} cannot be read: write a number from 0 (embedding output) to the number of blocks, or "
            "'final' (after the final norm), with 'encoder.' or 'decoder.' before it in an encoder-decoder model."
        )


FINAL = LayerRef("", -1)
"""What enters the head of a model with one stack."""


@dataclass(frozen=True, order=True)
class Tap:
    """A place inside a model that is no layer: the first argument, or the output, of the module at a dotted path."""

    module: str
    side: Literal["input", "output"]


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens of each position, and how likely they and all others together are.

    `ids` is `(..., k)`, int64, the likeliest first; `log_probabilities` `(..., k + 1)`, float32, holds theirs and, at
    the end, that of all other tokens together.
    """

    ids: Tensor
    log_probabilities: Tensor


@dataclass(frozen=True)
class TopK:
    """Which likeliest tokens: the `k` first, at a temperature, of the first `vocab_size` tokens (None: of all)."""

    k: int
    temperature: float = 1.0
    vocab_size: int | None = None


@dataclass(frozen=True)
class Signal:
    """What a model says about a batch.

    `logits` is `(batch, classes)` or `(batch, seq, vocab)`. `hidden[layer]` is `(batch, seq, hidden)`. `masks[stack]`
    is `(batch, seq)`, 1 on real tokens and 0 on padding. `taps[tap]` is `(batch, seq, features)`. `averages[layer]` is
    `(batch, hidden)`, the mean of a layer over each example's real tokens. `top[what]` are the likeliest tokens of each
    position, `(batch, seq, k)`; on padding all tokens are equally likely. `rows[layer]`, where the source has them, is
    `(tokens, hidden)`: what `hidden[layer]` holds at real tokens, example by example.
    """

    logits: Tensor | None
    hidden: Mapping[LayerRef, Tensor]
    masks: Mapping[StackName, Tensor]
    taps: Mapping[Tap, Tensor] = field(default_factory=dict)
    averages: Mapping[LayerRef, Tensor] = field(default_factory=dict)
    top: Mapping[TopK, TopTokens] = field(default_factory=dict)
    rows: Mapping[LayerRef, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Mean:
    """A sum and what it is divided by, so that micro-batches and ranks add up exactly.

    `total` and `count` are float32 scalars (float64 if the input was). `count` counts examples, tokens or labels, never
    elements: a loss that averages over the hidden axis does so inside `total`.
    """

    total: Tensor
    count: Tensor

    @property
    def value(self) -> Tensor:
        """`total / count`, and 0 (with a gradient of 0) where nothing was counted."""
        return self.total / self.count.clamp(min=1.0)

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)


@dataclass(frozen=True)
class Needs:
    """Which signals a term asks for; the trainer captures these and nothing else.

    `teacher_averages` are layers of which a term reads no more than each example's mean over its real tokens,
    `teacher_top` which likeliest tokens it reads in place of a language model's logits. A term
    that reads the student's logits says so, because where none does those of a language model are not made; and one
    that reads what either model says of padding (`teacher_padding`), because a cache does not hold it, and blocks that
    run without padding (`training.padding_free`) say nothing of it.
    """

    student: frozenset[LayerRef] = frozenset()
    teacher: frozenset[LayerRef] = frozenset()
    teacher_logits: bool = False
    student_taps: frozenset[Tap] = frozenset()
    teacher_taps: frozenset[Tap] = frozenset()
    teacher_averages: frozenset[LayerRef] = frozenset()
    student_logits: bool = False
    teacher_top: frozenset[TopK] = frozenset()
    teacher_padding: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.student | other.student,
            self.teacher | other.teacher,
            self.teacher_logits or other.teacher_logits,
            self.student_taps | other.student_taps,
            self.teacher_taps | other.teacher_taps,
            self.teacher_averages | other.teacher_averages,
            self.student_logits or other.student_logits,
            self.teacher_top | other.teacher_top,
            self.teacher_padding or other.teacher_padding,
        )

    @property
    def teacher_at_all(self) -> bool:
        """Whether the teacher has to be run."""
        read = self.teacher or self.teacher_taps or self.teacher_averages or self.teacher_top
        return self.teacher_logits or bool(read)


@dataclass(frozen=True)
class Progress:
    """Where training stands; random layer maps are functions of it, so that a resumed run draws the same maps."""

    epoch: int = 0
    step: int = 0


class Term(Protocol):
    """One named part of the objective; an `nn.Module`, so that its projections or filters train with the student."""

    name: str

    def needs(self, progress: Progress) -> Needs:
        """Return the layers and logits that a call will read at this point of training."""
        ...

    def unit(self, name: str) -> Unit:
        """Return what the count of the named mean counts."""
        ...

    def coefficient(self, name: str, progress: Progress) -> float:
        """Return what the named mean is multiplied by in the total."""
        ...

    def __call__(self, student: Signal, teacher: Signal | None, batch: Batch, progress: Progress) -> dict[str, Mean]:
        """Return named means, for example `{"hidden/3-6": Mean(...)}`."""
        ...


class TeacherSource(Protocol):
    """Whatever can say what the teacher says: the live model, or a record of it."""

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """Return the teacher's logits, layers and taps that `needs` asks for, on this batch."""
        ...


@dataclass
class Stage:
    """One training phase: what is trained, on which terms, with which changes to the recipe's training arguments.

    `student` is None where only the terms' own modules train. `teacher` takes the place of the recipe's teacher in this
    stage. `learning_rates` holds modules with a learning rate of their own; all others have the recipe's. `stock` is
    false while the student is not what its class makes of its config (adapters, blocks of another kind): checkpoints
    then hold its tensors by the names of its modules.
    """

    name: str
    student: nn.Module | None
    terms: nn.ModuleList
    training: dict[str, Any] = field(default_factory=dict)
    teacher: TeacherSource | None = None
    learning_rates: Sequence[tuple[nn.Module, float]] = ()
    stock: bool = True


@dataclass(frozen=True)
class StagePreview:
    """What `plan` says of a stage: its terms in words, layer maps, and what is left of it.

    `thrown_away` counts the parameters of modules that serve the training only; `student_parameters` is what the
    student has after the stage, None where the stage does not change that. `notes` are whole sentences. `training`
    is what the stage changes in the recipe's training arguments, None where nothing is trained. `asks` tells what its
    terms read of the teacher, by the number of epochs and of steps in one; where blocks are `chosen_later`, while the
    method runs, it tells that of some choice.
    """

    name: str
    terms: Sequence[str]
    maps: Sequence[Any] = ()
    thrown_away: int = 0
    student_parameters: int | None = None
    notes: Sequence[str] = ()
    training: Mapping[str, Any] | None = field(default_factory=dict)
    asks: Callable[[int, int], Needs] | None = None
    chosen_later: bool = False


@dataclass(frozen=True)
class Pair:
    """A teacher and a student as loaded, with what a method must know of them; each mapping has one entry per stack.

    While a recipe is checked there are no models (`teacher` None, `student` an empty module); while it is planned they
    are on the meta device, with shapes and without numbers.
    """

    teacher: nn.Module | None
    student: nn.Module
    task: str
    teacher_depth: Mapping[StackName, int]
    student_depth: Mapping[StackName, int]
    teacher_width: Mapping[StackName, int]
    student_width: Mapping[StackName, int]
    vocab_size: int | None
    """Token ids that both know; logits beyond are padding and get no probability. None outside language modelling."""
    seed: int
    teacher_adapters: Mapping[str, Tensor] | None = None
    """LoRA A matrices `(rank, in_features)` by the path of the teacher's module that they adapt; already merged in."""


Chosen = TypeVar("Chosen")


class RunContext(Protocol):
    """What a method may ask of the run around it."""

    @property
    def epochs(self) -> int:
        """Passes over the training data in one stage, rounded up."""
        ...

    def say(self, sentence: str) -> None:
        """Tell the user what the method does or found."""
        ...

    def decide(self, name: str, choose: Callable[[], Chosen]) -> Chosen:
        """Return what was chosen under `name` before (decisions.json), else choose now and keep it.

        The value must survive JSON. A resumed run reads it back and never chooses again.
        """
        ...

    def calibration(self) -> Sequence[Batch]:
        """Return the rows set aside for choosing, in batches, on the device of training; never the reported split."""
        ...

    def score(self, model: nn.Module) -> float:
        """Return the recipe's first metric on the calibration rows, its sign turned so that more is better."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """Return the recipe's metrics on the validation split, `{}` where there is none."""
        ...

    def training_batches(self) -> Iterator[Batch]:
        """Yield the training data once, in an order that never changes, on the device of training."""
        ...


class Method(Protocol):
    """A named generator of stages; it knows no trainer, and the trainer knows no method."""

    name: str
    summary: str
    Config: type[SectionConfig]
    one_stage: bool
    """Whether one stage is all, with nothing to do before or after it, so that a Trainer alone can run it."""
    grows_student: bool
    """Whether the student grows out of a copy of the teacher, so that a recipe has no `student` section."""

    def stages(self, pair: Pair, config: Any, context: RunContext) -> Iterator[Stage]:
        """Yield the training phases in order; code after a `yield` runs when that phase has finished.

        `pair.student` is changed in place; what it is at the end is the run's student.
        """
        ...

    def preview(self, pair: Pair, config: Any) -> list[StagePreview]:
        """Return what `stages` would do, from models on the meta device and without data."""
        ...

    def problems(self, config: Any, pair: Pair) -> list[str]:
        """Return one sentence per reason why `config` cannot work on this pair; models may be None here."""
        ...
