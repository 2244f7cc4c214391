"""iskd: which blocks are replaced when, what trains at which rate, and the same end after a kill."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from rich.console import Console
from tiny_models import DECODERS, ENCODERS, tiny_batch, tiny_model
from torch import nn
from toy import ToyCollator, toy_dataset

import layerdistill as ld
from layerdistill.api import make_pair
from layerdistill.context import LiveContext
from layerdistill.core.files import read_json
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.core.types import Pair, Progress, Stage
from layerdistill.data import set_aside
from layerdistill.evaluate import EvaluationConfig
from layerdistill.methods import replacing as replacing_module
from layerdistill.methods.iskd import METHOD, chosen_order
from layerdistill.methods.iskd_config import IskdConfig
from layerdistill.methods.iskd_order import PAPER_ORDERS, alternate, block_order
from layerdistill.methods.mixed_block import FittedBlock, MixedBlock, ReplacementSchedule
from layerdistill.methods.replacing import Replacing, bernoulli_share, ramp_share
from layerdistill.models import empty_model, find_stacks
from layerdistill.models.causality import causality_problem
from layerdistill.models.compact import CompactShape
from layerdistill.models.modeling_compact import CompactBlock
from layerdistill.signals import LiveTeacher, student_signal
from layerdistill.train.stage import StageInput, run_stage
from layerdistill.train.trainer import STUDENT_FILE, StageTrainer, save_student

QUICK: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "save_steps": 2, "logging_steps": 1,
    "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def only_new_objects_are_collected() -> Iterator[None]:
    """The Trainer collects garbage at both ends of every stage, which takes a second with all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def task_of(family: str) -> str:
    return "causal-lm" if family in DECODERS else "sequence-classification"


def pair_for(family: str = "gpt2", seed: int = 7, **options: Any) -> Pair:
    """A teacher and a student that is a copy of it."""
    teacher = tiny_model(family, task_of(family), **{"num_layers": 4, "hidden_size": 48, "seed": 1, **options})
    return make_pair(teacher, ld.make_student(teacher).float(), seed)


def given_for(pair: Pair, folder: Path, config: IskdConfig, **training: Any) -> StageInput:
    datasets = {"train": toy_dataset(pair.task, size=48, seed=3), "validation": toy_dataset(pair.task, size=16, seed=4)}
    if config.calibration is not None:
        datasets = set_aside(datasets, config.calibration, pair.seed)
    args = {**QUICK, **training}
    return StageInput(
        pair.task, datasets, ToyCollator(pair.task), None, args, pair.seed, folder, Console(quiet=True)
    )  # fmt: skip


class Heard(LiveContext):
    """A run's context that keeps what the user was told."""

    said: list[str]

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


def stages_of(
    pair: Pair, config: IskdConfig, folder: Path, **training: Any
) -> tuple[Iterator[Stage], StageInput, Heard]:
    given = given_for(pair, folder, config, **training)
    context = Heard(given, EvaluationConfig().metrics_for(pair.task))
    context.said = []
    return METHOD.stages(pair, config, context), given, context


def train(pair: Pair, config: IskdConfig, folder: Path, **training: Any) -> list[str]:
    """Run all stages and return their names."""
    stages, given, _ = stages_of(pair, config, folder, **training)
    names = []
    source = LiveTeacher(pair.teacher)
    for stage in stages:
        run_stage(stage, given, source)
        names.append(stage.name)
    return names


def replaced_places(model: nn.Module) -> list[int]:
    return [n for n, block in enumerate(find_stacks(model)[""].blocks) if isinstance(block, CompactBlock)]


# Orders


def test_orders_are_the_published_ones() -> None:
    assert alternate(12) == list(PAPER_ORDERS["paper-gpt2"]) == [5, 7, 3, 9, 1, 11, 2, 10, 4, 8, 6, 0]
    assert PAPER_ORDERS["paper-phi1"][:12] == (9, 1, 19, 15, 14, 7, 17, 8, 10, 11, 13, 20)
    for name, depth in (("paper-gpt2", 12), ("paper-phi1", 24)):
        assert sorted(PAPER_ORDERS[name]) == list(range(depth))


def test_alternate_takes_every_block_once_at_any_depth() -> None:
    for depth in range(1, 40):
        order = alternate(depth)
        assert sorted(order) == list(range(depth))
        assert order[-1] == 0
        assert all(block % 2 for block in order[: depth // 2])
    assert alternate(6) == [3, 1, 5, 2, 4, 0]


def test_orders_by_importance_at_random_and_by_hand() -> None:
    assert block_order("importance", 4, 0, lambda: [0.5, 0.1, 0.9, 0.1]) == [1, 3, 0, 2]
    drawn = [block_order("random", 12, seed, list) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert block_order([3, 1], 4, 0, list) == [3, 1]
    with pytest.raises(ld.UserError, match="more than once"):
        block_order([3, 3], 4, 0, list)


def test_importance_is_measured_on_rows_set_aside_and_kept(tmp_path: Path) -> None:
    config = IskdConfig(order="importance", importance="one_out_loss", calibration={"examples": 12})
    pair = pair_for(num_layers=3)
    with torch.no_grad():  # a block that does nothing
        for parameter in find_stacks(pair.student)[""].blocks[1].parameters():
            parameter.zero_()
    given = given_for(pair, tmp_path, config)
    context = LiveContext(given, ["perplexity"])
    assert 10 <= len(given.datasets["calibration"]) <= 12, "rows that also stand in the reported split are left out"
    order = chosen_order(config, pair, context)
    assert sorted(order) == [0, 1, 2]
    assert IskdConfig(order="importance").calibration is not None
    assert IskdConfig().calibration is None
    assert context.decide("iskd-order", lambda: [2, 1, 0]) == [2, 1, 0]
    stages, _, heard = stages_of(pair, config, tmp_path)
    next(stages)
    assert "2" in heard.said[0].split(": ")[1].split(",")[0], "what was decided before is not decided again"


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


# Schedules


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


# Preview and refusals


def planned(config: transformers.PretrainedConfig, method: IskdConfig) -> list[Any]:
    models = [empty_model(config, "causal-lm") for _ in range(2)]
    return METHOD.preview(make_pair(*models, seed=1), method)


def test_the_plan_says_the_published_sizes() -> None:
    previews = planned(transformers.GPT2Config(), IskdConfig(order="paper-gpt2", num_replaced=6, init="paper"))
    assert [preview.name for preview in previews][:2] == ["replace-1-block-5", "replace-2-block-7"]
    assert [preview.student_parameters for preview in previews] == [
        118_077_312, 111_714_816, 105_352_320, 98_989_824, 92_627_328, 86_264_832,
    ]  # fmt: skip
    assert "A compact block has 725,376 parameters, the block in its place 7,087,872 (10.23%)." in previews[0].notes
    assert previews[0].terms == ["0.5 × task", "0.5 × logits", "1 × hidden per pair"]


def test_the_plan_of_other_schedules() -> None:
    tiny = tiny_model("gpt2", "causal-lm", num_layers=4).config
    both = planned(tiny, IskdConfig(schedule="bernoulli"))
    one_by_one = planned(tiny, IskdConfig(order="importance"))
    assert [preview.name for preview in both] == ["replacing", "replaced"]
    assert both[-1].student_parameters == one_by_one[-1].student_parameters
    assert one_by_one[0].name == "replace-1-block-chosen"
    assert any("fitted to the one it replaces, for 200 steps" in note for note in one_by_one[0].notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": "paper-gpt2"}, "is for 12 blocks; this model has 4"),
        ({"order": [1, 4]}, r"\[4\] are no blocks"),
        ({"order": [1, 1]}, "more than once"),
        ({"num_replaced": 5}, "the model has 4 blocks"),
        ({"order": [1, 2], "num_replaced": 3}, "method.order lists 2 blocks"),
        ({"weights": {"task": 0, "logits": 0, "hidden": 0}}, "are all 0"),
        ({"logits_loss": "binary_kl"}, "does not fit the task"),
        ({"block": {"hidden_size": 50, "num_attention_heads": 3}}, "3 heads do not divide"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(options: dict[str, Any], words: str) -> None:
    problems = METHOD.problems(IskdConfig(**options), pair_for())
    assert any(re.search(words, problem) for problem in problems), problems


def test_problems_need_no_models() -> None:
    pair = Pair(None, nn.Identity(), "causal-lm", {"": 4}, {"": 4}, {"": 48}, {"": 48}, 64, 0)
    assert METHOD.problems(IskdConfig(), pair) == []
    two = Pair(None, nn.Identity(), "seq2seq", *[{"encoder": 2, "decoder": 2}] * 4, None, 0)
    assert "an encoder and a decoder" in METHOD.problems(IskdConfig(), two)[0]
    with pytest.raises(ValidationError):
        IskdConfig(init="xavier")


def test_a_block_that_leaks_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaking(CompactBlock):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) + args[0].mean(1, keepdim=True)

    made = replacing_module.new_compact_block

    def leaking(*args: Any) -> CompactBlock:
        block = made(*args)
        block.__class__ = Leaking
        return block

    monkeypatch.setattr(replacing_module, "new_compact_block", leaking)
    pair = pair_for("qwen3")
    before = fingerprint_model(pair.student)
    problems = METHOD.problems(IskdConfig(order=[1]), pair)
    assert len(problems) == 1
    assert "a token sees those that follow it" in problems[0]
    assert "Qwen3DecoderLayer in the place of block 1" in problems[0]
    assert fingerprint_model(pair.student) == before
    assert replaced_places(pair.student) == []
