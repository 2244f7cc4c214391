"""iskd: what trains in which stage at which rate, over all families, and the same end after a kill."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from iskd_cases import QUICK, pair_for, replaced_places, stages_of, task_of, train
from tiny_models import DECODERS, ENCODERS, tiny_batch, tiny_model
from toy import ToyCollator

import layerdistill as ld
from layerdistill.core.files import read_json
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.core.types import Progress
from layerdistill.methods.iskd_config import IskdConfig
from layerdistill.methods.mixed_block import FittedBlock
from layerdistill.methods.replacing import Replacing
from layerdistill.models import find_stacks
from layerdistill.models.causality import causality_problem
from layerdistill.models.compact import CompactShape
from layerdistill.signals import LiveTeacher, student_signal
from layerdistill.train.stage import run_stage
from layerdistill.train.trainer import STUDENT_FILE, StageTrainer, save_student


@pytest.fixture(scope="module", autouse=True)
def only_new_objects_are_collected() -> Iterator[None]:
    """The Trainer collects garbage at both ends of every stage, which takes a second with all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# Stages


def test_one_block_per_stage_in_order(tmp_path: Path) -> None:
    pair = pair_for()
    config = IskdConfig(order=[2, 0, 3], init="paper", num_replaced=3)
    stages, given, context = stages_of(pair, config, tmp_path, max_steps=1)
    seen = []
    for stage in stages:
        seen.append((stage.name, replaced_places(pair.student), stage.stock, [r for _, r in stage.learning_rates]))
        hidden = next(term for term in stage.terms if term.name == "hidden")
        assert hidden.maps[0].pairs == [(place + 1, place + 1) for place in replaced_places(pair.student)]
        run_stage(stage, given, LiveTeacher(pair.teacher))
    assert seen == [
        ("replace-1-block-2", [2], False, [1e-4]),
        ("replace-2-block-0", [0, 2], False, [1e-4]),
        ("replace-3-block-3", [0, 2, 3], False, [1e-4]),
    ]
    assert pair.student.config.layerdistill["replaced"] == [2, 0, 3]
    kept = read_json(tmp_path / "decisions.json")
    assert kept["iskd-order"] == [2, 0, 3]
    assert all(kept[f"iskd-metrics/{name}"]["perplexity"] > 1 for name, *_ in seen)
    assert sum("perplexity" in sentence for sentence in context.said) == 3


def test_two_learning_rates_by_membership(tmp_path: Path) -> None:
    # With 12 blocks, a prefix would take blocks 1, 10 and 11 together, as the released code does.
    pair = pair_for("gpt2", num_layers=12, hidden_size=16, num_heads=2)
    config = IskdConfig(order=[5, 1], init="paper", num_replaced=2, new_learning_rate=1e-3, weights={"hidden": 0})
    stages, given, _ = stages_of(pair, config, tmp_path, max_steps=1, learning_rate=2e-5)
    run_stage(next(stages), given, LiveTeacher(pair.teacher))
    stage = next(stages)
    args = ld.LayerDistillationConfig(output_dir=str(tmp_path), **{**QUICK, "learning_rate": 2e-5})
    trainer = StageTrainer(stage, pair.task, args, given.datasets["train"], data_collator=given.collator)
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: rates[id(p)] for name, p in pair.student.named_parameters()}
    assert len(rates) == len(names), "every parameter is in exactly one group"
    new = {name for name, rate in names.items() if rate == 1e-3}
    assert new == {name for name in names if name.startswith("transformer.h.1.")}
    assert {rate for name, rate in names.items() if name not in new} == {2e-5}
    assert names["transformer.h.5.up.weight"] == 2e-5, "earlier compact blocks have the recipe's"


@pytest.mark.parametrize("init", ["paper", "zero_up", "warmup"])
def test_inits(init: str) -> None:
    pair = pair_for()
    replacing = Replacing(pair.student, CompactShape(), init, seed=1)  # type: ignore[arg-type]
    block = replacing.new_block(2)
    again = replacing.new_block(2)
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), again.parameters(), strict=True))
    assert not torch.equal(block.down.weight, replacing.new_block(1).down.weight)
    limit = (6 / (48 + 12)) ** 0.5
    assert 0.9 * limit < block.down.weight.abs().max() <= limit, "Xavier-uniform"
    assert not block.down.bias.any()
    assert not block.up.bias.any()
    assert bool(block.up.weight.any()) == (init == "paper")
    state = torch.random.get_rng_state()
    replacing.new_block(3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_new_block_is_fitted_to_the_one_it_replaces(tmp_path: Path) -> None:
    pair = pair_for("llama")
    config = IskdConfig(order=[1], warmup_steps=60, new_learning_rate=1e-2)
    stages, given, _ = stages_of(pair, config, tmp_path, max_steps=1)
    before = fingerprint_model(pair.student)
    stage = next(stages)
    fitted = find_stacks(pair.student)[""].blocks[1]
    assert isinstance(fitted, FittedBlock)
    batch = ToyCollator(pair.task)([given.datasets["train"][row] for row in range(16)])

    def unexplained() -> float:
        """The equation in float64, from what the two blocks return."""
        found = {}
        hooks = [
            module.register_forward_hook(lambda _, args, output, name=name: found.update({name: (args[0], output)}))
            for name, module in (("old", fitted.old), ("new", fitted.new))
        ]
        with torch.no_grad():
            pair.student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for hook in hooks:
            hook.remove()
        real = batch["attention_mask"].bool()
        x, old, new = (t[real].double() for t in (*found["old"], found["new"][1]))
        return float((new - old).square().mean() / (old - x).square().mean())

    pair.student.eval()
    start = unexplained()
    assert start == pytest.approx(1.0, abs=1e-6), "it hands its input on"
    means = stage.terms[0](
        student_signal(pair.student, batch, (), stage.terms[0].needs(Progress()).student_taps), None, batch, Progress()
    )
    assert means["fit"].value.item() == pytest.approx(start, abs=1e-5)
    trainable = {name for name, p in pair.student.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in pair.student.named_parameters() if name.startswith("model.layers.1.new.")}
    run_stage(stage, given, None)
    assert unexplained() < 0.7
    next(stages)
    assert replaced_places(pair.student) == [1]
    assert all(p.requires_grad for p in pair.student.parameters())
    untouched = tiny_model("llama", "causal-lm", num_layers=4, hidden_size=48, seed=1)
    assert before == fingerprint_model(untouched)
    for name, tensor in pair.student.state_dict().items():
        if "layers.1." not in name:
            assert torch.equal(tensor, untouched.state_dict()[name])


# The whole


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_every_family_learns_and_reopens(family: str, tmp_path: Path) -> None:
    pair = pair_for(family)
    before = fingerprint_model(pair.teacher)
    config = IskdConfig(order=[1], warmup_steps=3, new_learning_rate=5e-3)
    names = train(pair, config, tmp_path / "run", max_steps=12, save_strategy="no", learning_rate=2e-3)
    assert names == ["fit-block-1", "replace-1-block-1"]
    assert fingerprint_model(pair.teacher) == before
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line.get("stage") == names[1]]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    save_student(pair.student, tmp_path / "student")
    again = ld.load_student(tmp_path / "student")
    batch = tiny_batch(pair.student)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, pair.student.eval()(**batch).logits)
    assert replaced_places(again) == [1]
    if family in DECODERS:
        assert causality_problem(again) is None
    start = tiny_model(family, task_of(family), num_layers=4, hidden_size=48, seed=1).state_dict()
    kept = {name: tensor for name, tensor in pair.student.state_dict().items() if name in start}
    assert sum(not torch.equal(tensor, start[name]) for name, tensor in kept.items()) > 0.8 * len(kept)


def run_in_a_fork(config: IskdConfig, folder: Path, die_after: int | None) -> int:
    """Train in a process of its own, which kills itself after writing so many checkpoints; returns its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        torch.set_num_threads(1)
        pair = pair_for()
        written = []
        original = StageTrainer._finish_checkpoint

        def counted(trainer: StageTrainer, *places: Path) -> None:
            original(trainer, *places)
            written.append(places)
            if die_after is not None and len(written) == die_after:
                os.kill(os.getpid(), signal.SIGKILL)

        StageTrainer._finish_checkpoint = counted  # type: ignore[method-assign]
        train(pair, config, folder)
        save_student(pair.student, folder / "student")
        status = 0
    finally:
        os._exit(status)


@pytest.mark.parametrize(
    ("options", "deaths"),
    [
        ({"init": "warmup", "warmup_steps": 4}, (1, 4, 6)),
        ({"init": "paper", "schedule": "blend", "ramp_steps": 3}, (1,)),
        ({"init": "paper", "schedule": "bernoulli"}, (1,)),
    ],
)
def test_killed_and_resumed_is_bit_identical(options: dict[str, Any], deaths: tuple[int, ...], tmp_path: Path) -> None:
    config = IskdConfig(num_replaced=2, **options)
    assert run_in_a_fork(config, tmp_path / "whole", None) == 0
    expected = (tmp_path / "whole" / "student" / "model.safetensors").read_bytes()
    for death in deaths:
        folder = tmp_path / f"killed-{death}"
        assert run_in_a_fork(config, folder, death) == -signal.SIGKILL
        assert list(folder.rglob(STUDENT_FILE))
        assert run_in_a_fork(config, folder, None) == 0
        assert (folder / "student" / "model.safetensors").read_bytes() == expected
        assert read_json(folder / "decisions.json") == read_json(tmp_path / "whole" / "decisions.json")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
