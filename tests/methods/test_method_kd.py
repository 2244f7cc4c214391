"""Knowledge distillation: which terms there are, and that the temperature does not change how strong they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from term_references import draw, pair_of, probabilities, signal

from layerdistill.core.types import Progress
from layerdistill.methods.kd import METHOD, KdConfig
from layerdistill.methods.logits_term import LogitsTerm


def terms(task: str = "sequence-classification", **options: Any) -> list[Any]:
    stages = list(METHOD.stages(pair_of(task, vocab_size=7), KdConfig(**options)))
    assert len(stages) == 1
    return list(stages[0].terms)


def test_terms_without_weight_are_left_out() -> None:
    assert [(term.name, term.weight) for term in terms()] == [("task", 1.0), ("logits", 1.0)]
    given = {"task": 0.0, "logits": 0.3}
    assert [(term.name, term.weight) for term in terms(weights=given)] == [("logits", 0.3)]
    assert METHOD.problems(KdConfig(), pair_of()) == []
    problems = METHOD.problems(KdConfig(weights={"logits": 0.0}), pair_of())
    assert len(problems) == 1
    assert "weights.logits is 0, which makes kd plain fine-tuning" in problems[0]


def test_options_reach_the_term() -> None:
    term = terms("causal-lm", temperature=3.0, logits_loss="reverse_kl")[1]
    assert (term.temperature, term.loss, term.vocab_size, term.task) == (3.0, "reverse_kl", 7, "causal-lm")
    assert terms("regression")[1].loss == "mse"


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_gradient_is_the_difference_of_softened_probabilities(temperature: float) -> None:
    """Hinton et al. 2015, equation 2: dC/dz = (q - p) / T, which T squared turns into T (q - p)."""
    ours, theirs = draw(4, 6, seed=1).requires_grad_(), draw(4, 6, seed=2)
    term = LogitsTerm("sequence-classification", 1.0, "forward_kl", temperature)
    term(signal(logits=ours), signal(logits=theirs), {}, Progress())["logits"].value.backward()
    assert ours.grad is not None
    for row, student, teacher in zip(ours.grad, ours.tolist(), theirs.tolist(), strict=True):
        q, p = probabilities(student, temperature), probabilities(teacher, temperature)
        expected = [temperature * (a - b) / 4 for a, b in zip(q, p, strict=True)]
        torch.testing.assert_close(row, torch.tensor(expected), atol=1e-6, rtol=1e-4)


def test_at_high_temperature_it_is_half_the_squared_error_of_centred_logits() -> None:
    """Hinton et al. 2015, section 2.1: the high-temperature limit; sum over classes / 2N, here per example."""
    ours, theirs = draw(4, 6, seed=1).double(), draw(4, 6, seed=2).double()
    term = LogitsTerm("sequence-classification", 1.0, "forward_kl", 1e4)
    found = term(signal(logits=ours), signal(logits=theirs), {}, Progress())["logits"].value.item()
    difference = (ours - ours.mean(1, keepdim=True)) - (theirs - theirs.mean(1, keepdim=True))
    assert found == pytest.approx((difference.square().sum(1) / (2 * 6)).mean().item(), rel=1e-3)
