"""Which student layer learns from which teacher layer.

Layers are numbered as in `hidden_states`: 0 = embedding output, k = output of block k. In the formulas below n counts
student blocks from 0, N_S and N_T are the numbers of blocks, and `forward` is `g(n) = ceil((n + 1) N_T / N_S) - 1`
(0-based blocks; Yu et al. 2025, "Layer selection doesn't matter (much)", their released tables).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from layerdistill.core.errors import UserError, one_of
from layerdistill.core.seeds import random_for
from layerdistill.core.types import LayerRef, StackName

Strategy = Literal["forward", "reverse", "all_to_one", "random", "in_order_random", "average", "last", "skip"]
Redraw = Literal["run", "epoch", "batch"]
Group = tuple[int, tuple[int, ...]]
"""A student layer and the teacher layers whose mean it is matched with; mostly one."""

STRATEGIES: tuple[str, ...] = get_args(Strategy)
REDRAWS: tuple[str, ...] = get_args(Redraw)
DRAWN = ("random", "in_order_random")
EXPLICIT = "explicit"


@dataclass(frozen=True)
class LayerMap:
    """The map of one stack, made by `layer_map`; a random one is a pure function of the seed and of where training is.

    `groups` holds, for each student layer, the teacher layers whose mean it is matched with (more than one only for
    `average`), as it stands at epoch 0 and step 0.
    """

    strategy: str
    student_layers: int
    teacher_layers: int
    groups: tuple[Group, ...]
    seed: int = 0
    embeddings: bool = False
    redraw: Redraw = "run"
    stack: StackName = ""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All (student layer, teacher layer) pairs at epoch 0 and step 0; `average` has several to a student layer."""
        return self.at(0, 0)

    def at(self, epoch: int, step: int) -> list[tuple[int, int]]:
        """Return the pairs in force at this epoch (from 0) and optimiser step; the same on every call and process."""
        return [(student, teacher) for student, group in self.groups_at(epoch, step) for teacher in group]

    def groups_at(self, epoch: int, step: int) -> tuple[Group, ...]:
        """Return the groups in force at this epoch (from 0) and optimiser step."""
        if self.redraw == "run":
            return self.groups
        return _drawn_groups(self, epoch if self.redraw == "epoch" else step)

    def refs_at(self, epoch: int, step: int) -> tuple[tuple[LayerRef, tuple[LayerRef, ...]], ...]:
        """Return `groups_at` with layer references that name the stack."""
        return tuple(
            (LayerRef(self.stack, student), tuple(LayerRef(self.stack, teacher) for teacher in group))
            for student, group in self.groups_at(epoch, step)
        )


def layer_map(
    strategy_or_pairs: str | Iterable[Sequence[int | str]],
    student_layers: int,
    teacher_layers: int,
    seed: int = 0,
    embeddings: bool = False,
    *,
    redraw: Redraw = "run",
    all_to_one_target: int | None = None,
    stack: StackName = "",
) -> LayerMap:
    """Return the map between a student of `student_layers` blocks and a teacher of `teacher_layers` blocks.

    - `forward`: block n to g(n). `reverse`: n to g(N_S - 1 - n).
    - `all_to_one`: all to layer `all_to_one_target`, by default N_T // 2.
    - `random`: a random permutation of the forward targets.
    - `in_order_random`: a sorted random subset of teacher blocks (RAIL-KD).
    - `average`: n to the mean of blocks g(n - 1) + 1 .. g(n), or to g(n) alone if that is empty.
    - `last`: the last N_S teacher blocks (PKD-last).
    - `skip`: layer k to layer floor(k N_T / N_S), every (N_T / N_S)-th (PKD-skip). Equal to `forward` if N_S divides
      N_T, else earlier. PKD leaves the last student block to the logits loss; here it is matched too.
    - explicit pairs such as `[(1, 4), (2, 8), ("final", "final")]`, `"encoder.1"` where there are two stacks.

    `embeddings` adds the pair (0, 0), in `all_to_one` (0, target). `redraw` draws a random map once per run, anew for
    each epoch, or for each batch (optimiser step). The draw does not depend on the stack: an encoder and a decoder of
    equal depths have equal maps, as in the released code. Raises UserError, with the reason, for what cannot be.
    """
    for whose, depth in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
        if depth < 1:
            raise UserError(f"{whose} is {depth}, but must be the number of blocks, at least 1.")
    if redraw not in REDRAWS:
        raise UserError(one_of("redraw", redraw, REDRAWS))
    if stack not in get_args(StackName):
        raise UserError(one_of("stack", stack, ("'' (a model with one stack)", "encoder", "decoder")))
    strategy = strategy_or_pairs if isinstance(strategy_or_pairs, str) else EXPLICIT
    if strategy not in (*STRATEGIES, EXPLICIT) or strategy_or_pairs == EXPLICIT:
        raise UserError(one_of("layer_map", strategy, STRATEGIES) + " Or give a list of (student, teacher) pairs.")
    if redraw != "run" and strategy not in DRAWN:
        raise UserError(
            f"redraw is {redraw!r}, but layer_map {strategy!r} draws nothing: only {' and '.join(DRAWN)} can be "
            "redrawn. Leave redraw out."
        )
    if all_to_one_target is not None and strategy != "all_to_one":
        raise UserError(f"all_to_one_target is given, but layer_map is {strategy!r}: it belongs to all_to_one only.")
    empty = LayerMap(strategy, student_layers, teacher_layers, (), seed, embeddings, redraw, stack)
    if strategy in DRAWN:
        groups = _drawn_groups(empty, 0)
    elif isinstance(strategy_or_pairs, str):
        groups = _fixed_groups(empty, all_to_one_target)
    else:
        groups = _explicit_groups(empty, strategy_or_pairs)
    return LayerMap(strategy, student_layers, teacher_layers, groups, seed, embeddings, redraw, stack)


class MapRow(NamedTuple):
    """A student layer and its teacher layers as text, as `hidden_states` numbers and as blocks counted from 0."""

    student_layer: str
    teacher_layer: str
    student_block: str
    teacher_block: str


def map_rows(given: LayerMap, epoch: int = 0, step: int = 0) -> list[MapRow]:
    """Return the map as rows of text in both index forms, for example `("encoder.1", "encoder.2", "0", "1")`."""
    return [
        MapRow(
            str(student),
            ", ".join(str(teacher) for teacher in teachers),
            _block_name(student.number),
            ", ".join(_block_name(teacher.number) for teacher in teachers),
        )
        for student, teachers in given.refs_at(epoch, step)
    ]


def _block_name(number: int) -> str:
    return {0: "embeddings", -1: "final norm"}.get(number, str(number - 1))


def _forward(student_layers: int, teacher_layers: int) -> list[int]:
    """Teacher layers (from 1) of student layers 1, 2, ...: ceil(k N_T / N_S)."""
    return [-(-layer * teacher_layers // student_layers) for layer in range(1, student_layers + 1)]


def _fixed_groups(shape: LayerMap, all_to_one_target: int | None) -> tuple[Group, ...]:
    student_layers, teacher_layers = shape.student_layers, shape.teacher_layers
    forward = _forward(student_layers, teacher_layers)
    if shape.strategy == "all_to_one":
        target = max(teacher_layers // 2, 1) if all_to_one_target is None else all_to_one_target
        _check_range("all_to_one_target", target, teacher_layers)
        return _numbered([(target,)] * student_layers, (target,) if shape.embeddings else None)
    targets: list[tuple[int, ...]]
    if shape.strategy == "forward":
        targets = [(target,) for target in forward]
    elif shape.strategy == "reverse":
        targets = [(target,) for target in reversed(forward)]
    elif shape.strategy == "average":
        starts = [1, *(target + 1 for target in forward[:-1])]
        targets = [tuple(range(min(start, target), target + 1)) for start, target in zip(starts, forward, strict=True)]
    else:
        _refuse_deeper_student(shape)
        layers = range(1, student_layers + 1)
        if shape.strategy == "last":
            targets = [(teacher_layers - student_layers + layer,) for layer in layers]
        else:
            targets = [(layer * teacher_layers // student_layers,) for layer in layers]
    return _numbered(targets, (0,) if shape.embeddings else None)


def _drawn_groups(shape: LayerMap, number: int) -> tuple[Group, ...]:
    generator = random_for(shape.seed, "layer_map", shape.strategy, shape.redraw, number)
    if shape.strategy == "random":
        drawn = _forward(shape.student_layers, shape.teacher_layers)
        generator.shuffle(drawn)
    else:
        _refuse_deeper_student(shape)
        drawn = sorted(generator.sample(range(1, shape.teacher_layers + 1), shape.student_layers))
    return _numbered([(target,) for target in drawn], (0,) if shape.embeddings else None)


def _explicit_groups(shape: LayerMap, pairs: Iterable[Sequence[int | str]]) -> tuple[Group, ...]:
    found: list[tuple[int, int]] = []
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise UserError(
                f"layer_map holds {pair!r}, but must hold pairs (student layer, teacher layer): [[1, 4], ...]."
            )
        student = _layer_number("student", pair[0], shape.student_layers, shape.stack)
        teacher = _layer_number("teacher", pair[1], shape.teacher_layers, shape.stack)
        if (student, teacher) in found:
            raise UserError(f"layer_map holds the pair ({student}, {teacher}) twice: leave one out.")
        found.append((student, teacher))
    if not found:
        raise UserError("layer_map is an empty list: give at least one (student, teacher) pair, or a strategy's name.")
    if shape.embeddings and (0, 0) not in found:
        found.insert(0, (0, 0))
    return tuple((student, (teacher,)) for student, teacher in found)


def _layer_number(whose: str, given: int | str, depth: int, stack: StackName) -> int:
    ref = LayerRef.parse(given)
    if ref.stack and ref.stack != stack:
        raise UserError(
            f"layer_map names the {whose}'s layer {str(ref)!r}, but this is the map of "
            f"{f'the {stack}' if stack else 'a model with one stack, whose layers have no prefix'}."
        )
    if ref.number >= 0:
        _check_range(f"the {whose}'s layer in layer_map", ref.number, depth)
    return ref.number


def _check_range(what: str, number: int, depth: int) -> None:
    if not 0 <= number <= depth:
        raise UserError(
            f"{what} is {number}, but must be from 0 to {depth}: 0 = embedding output, k = output of block k, "
            f"{depth} = output of the last block."
        )


def _refuse_deeper_student(shape: LayerMap) -> None:
    if shape.student_layers > shape.teacher_layers:
        raise UserError(
            f"layer_map {shape.strategy!r} gives each student block a teacher block of its own, but the student has "
            f"{shape.student_layers} blocks and the teacher {shape.teacher_layers}. Use forward, reverse, average, "
            "random or all_to_one, which may use a teacher block twice, or explicit pairs."
        )


def _numbered(targets: Sequence[tuple[int, ...]], embeddings: tuple[int, ...] | None) -> tuple[Group, ...]:
    with_embeddings: list[Group] = [] if embeddings is None else [(0, embeddings)]
    return (*with_embeddings, *enumerate(targets, start=1))
