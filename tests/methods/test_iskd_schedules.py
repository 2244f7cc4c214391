"""iskd: how a new block takes over from an old one, by the step, by chance and by degrees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from iskd_cases import pair_for, replaced_places, stages_of
from tiny_models import tiny_batch

import layerdistill as ld
from layerdistill.methods.iskd_config import IskdConfig
from layerdistill.methods.mixed_block import MixedBlock, ReplacementSchedule
from layerdistill.methods.replacing import Replacing, bernoulli_share, ramp_share
from layerdistill.models import find_stacks
from layerdistill.models.compact import CompactShape
from layerdistill.signals import LiveTeacher
from layerdistill.train.stage import run_stage


def test_the_rate_of_replacement() -> None:
    assert [ramp_share(4, step, 0) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    draws = [bernoulli_share(0.3, 6e-4, 5, step, place) for step in range(500) for place in range(6)]
    expected = sum(min(1.0, 0.3 + 6e-4 * step) for step in range(500)) / 500
    assert sum(draws) / len(draws) == pytest.approx(expected, abs=0.03)
    assert draws == [bernoulli_share(0.3, 6e-4, 5, step, place) for step in range(500) for place in range(6)]
    by_place = [draws[place::6] for place in range(6)]
    assert len({tuple(column) for column in by_place}) == 6, "each block has draws of its own"
    assert {bernoulli_share(0.3, 6e-4, 5, step, 0) for step in range(1167, 1400)} == {1.0}


@pytest.mark.parametrize("family", ["gpt2", "deberta-v2"])
def test_a_mixed_block_is_what_its_equation_says(family: str) -> None:
    pair = pair_for(family)
    replacing = Replacing(pair.student, CompactShape(), "paper", seed=1)
    mixed = replacing.mix(1, replacing.new_block(1))
    batch = tiny_batch(pair.student)

    def layer_two(share: float | None) -> torch.Tensor:
        mixed.train(share is not None)
        mixed.share = share or 0.0
        with torch.no_grad(), ld.capture(pair.student, [2]) as hidden:
            pair.student(**batch)
        return hidden[2]

    with torch.no_grad(), ld.capture(pair.teacher, [2]) as hidden:
        pair.teacher(**batch)
    old, new = layer_two(0.0), layer_two(1.0)
    assert torch.equal(old, hidden[2])
    assert torch.equal(new, layer_two(None)), "in eval mode the new block stands alone"
    assert not torch.allclose(old, new, atol=1e-3)
    torch.testing.assert_close(layer_two(0.25), 0.75 * old + 0.25 * new, atol=1e-5, rtol=1e-5)


def test_blend_goes_from_the_old_block_to_the_new(tmp_path: Path) -> None:
    pair = pair_for()
    config = IskdConfig(order=[2, 1], init="paper", schedule="blend", ramp_steps=4, num_replaced=2)
    stages, given, _ = stages_of(pair, config, tmp_path, max_steps=6, save_steps=100)
    stage = next(stages)
    mixed = find_stacks(pair.student)[""].blocks[2]
    assert isinstance(mixed, MixedBlock)
    kept = {name: p.clone() for name, p in mixed.old.named_parameters()}
    shares = []
    mixed.new.register_forward_pre_hook(lambda *_: shares.append(mixed.share) if mixed.training else None)
    run_stage(stage, given, LiveTeacher(pair.teacher))
    assert shares == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(torch.equal(p, kept[name]) for name, p in mixed.old.named_parameters()), "on its way out"
    next(stages)
    assert replaced_places(pair.student) == [2]
    assert find_stacks(pair.student)[""].blocks[2] is mixed.new


def test_bernoulli_replaces_all_and_then_trains_them(tmp_path: Path) -> None:
    pair = pair_for("bert")
    config = IskdConfig(num_replaced=3, init="paper", schedule="bernoulli", rate_start=0.4, trained="new")
    stages, given, _ = stages_of(pair, config, tmp_path, max_steps=6, gradient_accumulation_steps=2, save_steps=100)
    stage = next(stages)
    mixed = [block for block in find_stacks(pair.student)[""].blocks if isinstance(block, MixedBlock)]
    assert len(mixed) == 3
    schedule = stage.terms[-1]
    assert isinstance(schedule, ReplacementSchedule)
    assert not list(schedule.parameters())
    seen: list[float] = []
    first = schedule.mixed[0][0]
    first.new.register_forward_pre_hook(lambda *_: seen.append(first.share) if first.training else None)
    start = {name: p.clone() for name, p in pair.student.named_parameters()}
    run_stage(stage, given, LiveTeacher(pair.teacher))
    expected = [bernoulli_share(0.4, 6e-4, 7, step, 0) for step in range(6) for _ in range(2)]
    assert seen == expected
    moved = {name for name, p in pair.student.named_parameters() if not torch.equal(p, start[name])}
    assert moved
    assert all(".new." in name for name in moved)
    second = next(stages)
    assert (stage.name, second.name) == ("replacing", "replaced")
    assert replaced_places(pair.student) == [1, 2, 3]
    run_stage(second, given, LiveTeacher(pair.teacher))
    assert next(stages, None) is None
    assert all(p.requires_grad for p in pair.student.parameters())
