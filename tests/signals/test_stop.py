"""A frozen model is run no further than to the highest layer that is wanted, and works as before afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch import Tensor

from layerdistill.core.types import LayerRef, Needs
from layerdistill.models import find_stacks
from layerdistill.signals import LiveTeacher, run_model

ENCODER_DECODER = {"bart", "t5"}
IDS = torch.arange(5, 17).view(2, 6)
BATCH = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])}


def blocks_run(model: Any) -> list[int]:
    """Grows by a block's number each time that it has been run."""
    found: list[int] = []
    for stack in find_stacks(model).values():
        for number, block in enumerate(stack.blocks):
            block.register_forward_hook(lambda *_, number=number: found.append(number))
    return found


def states(model: Any, *numbers: int) -> dict[LayerRef, Tensor]:
    return dict(LiveTeacher(model).signal(BATCH, Needs(teacher=frozenset(LayerRef("", n) for n in numbers))).hidden)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - ENCODER_DECODER))
def test_no_block_above_is_run_and_nothing_else_changes(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        everything = [LayerRef("", number) for number in (0, 1, 2, 3, 4, -1)]
        whole = run_model(model, BATCH, everything, logits=False).hidden
    run = blocks_run(model)
    for wanted in ((0,), (1,), (0, 2), (3,)):
        run.clear()
        found = states(model, *wanted)
        assert run == list(range(max(wanted)))
        for layer, state in found.items():
            assert torch.equal(state, whole[layer])
    for wanted in ((4,), (1, -1)):
        run.clear()
        found = states(model, *wanted)
        assert run == [0, 1, 2, 3]
        for layer, state in found.items():
            assert torch.equal(state, whole[layer]), "as before, after passes that were ended early"


def test_logits_and_graphs_need_the_whole_model() -> None:
    model = tiny_model("bert", "sequence-classification")
    run = blocks_run(model)
    LiveTeacher(model).signal(BATCH, Needs(teacher=frozenset({LayerRef("", 1)}), teacher_logits=True))
    assert run == [0, 1, 2, 3]
    run.clear()
    run_model(model, BATCH, [LayerRef("", 1)], logits=False)
    assert run == [0, 1, 2, 3]


@pytest.mark.parametrize("family", sorted(ENCODER_DECODER))
def test_two_stacks_are_run_whole(family: str) -> None:
    model = tiny_model(family, "sequence-classification")
    batch = {**BATCH, "input_ids": torch.cat([IDS[:, :-1], torch.full((2, 1), 2)], dim=1)}
    run = blocks_run(model)
    LiveTeacher(model).signal(batch, Needs(teacher=frozenset({LayerRef("encoder", 1)})))
    assert len(run) == 8
