"""The repair of layer_prune: where holes are, what is matched and trained there, and the loss of the released code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from toy import ToyCollator, toy_dataset, toy_rows
from transformers import TrainingArguments

import layerdistill as ld
from layerdistill.api import make_pair
from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef, Pair, Progress
from layerdistill.methods.layer_prune import METHOD, LayerPruneConfig
from layerdistill.methods.prune_repair import hole_positions, matched_layers, neighbours, only_training, repair_map
from layerdistill.signals import LiveTeacher, student_signal
from layerdistill.train.trainer import StageTrainer


def test_where_the_holes_are_and_what_is_matched_there() -> None:
    assert hole_positions([19]) == [19]
    assert hole_positions([3, 4, 9]) == [3, 7]
    kept = [block for block in range(36) if block != 19]
    assert matched_layers(19, kept, 36) == (19, 20), "what enters the block above is the removed block's output"
    assert neighbours([19], 35, 1) == [18, 19], "the released launch script trains 18 and 19 after removing 19"
    again = [block for block in kept if block != 20]
    assert matched_layers(19, again, 36) == (19, 21), "a hole that grew skips all that is gone"
    assert matched_layers(0, [1, 2, 3], 4) == (1, 2)
    assert matched_layers(3, [0, 1, 2], 4) == (3, 4)
    assert neighbours([0], 3, 1) == [0]
    assert neighbours([3], 3, 1) == [2]
    assert neighbours([1, 4], 6, 2) == [0, 1, 2, 3, 4, 5]
    refs = repair_map([19], kept, 36).refs_at(0, 0)
    assert refs == ((LayerRef("", 19), (LayerRef("", 20),)), (LayerRef("", -1), (LayerRef("", -1),)))
    assert repair_map([0, 1], [1, 3], 4).pairs == [(1, 3), (-1, -1)], "one target for a block between two holes"


def stage_of(pair: Pair, **options: Any) -> Any:
    """The first repair stage of a pair, ready to train."""
    config = LayerPruneConfig(importance="block_influence", num_removed=1, **options)

    class Chosen:
        def decide(self, name: str, choose: Any) -> Any:
            depth = pair.teacher_depth[""]
            return {
                "importance": "given", "scores": [0.0] * depth, "candidates_evaluated": 0, "removed": [1],
                "removed_original": [1], "kept_original": [0, *range(2, depth)],
            }  # fmt: skip

        def say(self, sentence: str) -> None: ...

    return METHOD.stages(pair, config, Chosen())


@pytest.mark.parametrize("count_padding", [False, True])
def test_the_papers_loss_is_what_its_code_computes(count_padding: bool, tmp_path: Path) -> None:
    """KL summed / 100 + two mean squared errors, of every micro-batch, then averaged over micro-batches."""
    teacher = tiny_model("llama", "causal-lm", num_layers=4, seed=3).double()
    pair = make_pair(teacher, ld.make_student(teacher), 0)
    generator = stage_of(pair, loss="paper", count_padding=count_padding)
    stage = next(generator)
    rows = toy_rows("causal-lm", size=6, seed=2)
    batches = [ToyCollator("causal-lm")(rows[:2]), ToyCollator("causal-lm")(rows[2:])]
    expected = torch.tensor(0.0, dtype=torch.float64)
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        ours = pair.student(**inputs, output_hidden_states=True)
        with torch.no_grad():
            theirs = teacher(**inputs, output_hidden_states=True)
        real = torch.ones_like(batch["attention_mask"]) if count_padding else batch["attention_mask"]
        ratio = theirs.logits.log_softmax(-1) - ours.logits.log_softmax(-1)
        divergence = (theirs.logits.softmax(-1) * ratio).sum(-1)
        loss = (divergence * real).sum() / 100
        # Removing block 1 of 4: student layer 1 (what enters the block above) against the teacher's layer 2.
        for mine, wanted in (
            (ours.hidden_states[1], theirs.hidden_states[2]),
            (ours.hidden_states[-1], theirs.hidden_states[-1]),
        ):
            loss = loss + (mine - wanted)[real.bool()].square().mean()
        expected = expected + loss / len(batches)
    expected_grads = torch.autograd.grad(expected, [p for p in pair.student.parameters() if p.requires_grad])
    args = TrainingArguments(str(tmp_path), use_cpu=True, save_strategy="no", report_to=[])
    data, source = toy_dataset("causal-lm"), LiveTeacher(teacher)
    trainer = StageTrainer(stage, "causal-lm", args, data, source, data_collator=ToyCollator("causal-lm"))
    found = 0.0
    trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found += loss.item()
    assert found == pytest.approx(expected.item(), rel=1e-9)
    trained = [p for p in pair.student.parameters() if p.requires_grad]
    assert len(trained) == 2 * 9
    for parameter, gradient in zip(trained, expected_grads, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12)


def test_the_papers_weight_is_41_per_mean_token_of_its_batch() -> None:
    teacher = tiny_model("gpt2", "causal-lm", num_layers=3, seed=3, n_positions=2048)
    pair = make_pair(teacher, ld.make_student(teacher), 0)
    term = next(stage_of(pair, loss="paper")).terms[0]
    ids = torch.randint(3, 60, (2, 2048))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        signal = student_signal(pair.student, batch, [])
        theirs = LiveTeacher(teacher).signal(batch, term.needs(Progress()))
        found = term(signal, theirs, batch, Progress())["logits"]
        mean = ld.matching.forward_kl(signal.logits, theirs.logits).value
    assert float(found.value / mean) == pytest.approx(40.96, rel=1e-4)


def test_blocks_that_share_their_parameters_are_not_trained_alone() -> None:
    model = tiny_model("llama", "causal-lm", num_layers=3)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(UserError, match="shares parameters of its blocks"), only_training(model, [0]):
        pass
    model.lm_head.weight.requires_grad_(False)
    with only_training(model, [1]):
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(name.startswith("model.layers.1.") for name in names)
        assert len(names) == 9
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["lm_head.weight"]
