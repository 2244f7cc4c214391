"""iskd: in which order blocks go, what the plan says, and what is refused before anything is trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from iskd_cases import given_for, pair_for, replaced_places, stages_of
from pydantic import ValidationError
from tiny_models import tiny_model
from torch import nn

import layerdistill as ld
from layerdistill.api import make_pair
from layerdistill.context import LiveContext
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.core.types import Pair
from layerdistill.methods import replacing as replacing_module
from layerdistill.methods.iskd import METHOD, chosen_order
from layerdistill.methods.iskd_config import IskdConfig
from layerdistill.methods.iskd_order import PAPER_ORDERS, alternate, block_order
from layerdistill.models import empty_model, find_stacks
from layerdistill.models.modeling_compact import CompactBlock

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
