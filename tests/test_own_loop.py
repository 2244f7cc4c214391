"""The page about one's own loop: its code runs, and does what it is said to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import ROOT, blocks
from toy_recipe import write_teacher
from transformers import PreTrainedModel

from layerdistill.matching import cross_entropy, forward_kl, next_token_labels

PAGE = ROOT / "docs" / "own_loop.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's two blocks leave behind, run one after the other where their models lie."""
    folder = tmp_path_factory.mktemp("loop")
    write_teacher(folder / "teacher", hidden_size=128)
    write_teacher(folder / "language-teacher", "gpt2", "causal-lm")
    first, second = blocks(PAGE, "python")
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(first, PAGE.name, "exec"), found)
        found["classifier"], found["last"] = found["student"], found["loss"].item()
        exec(compile(second, PAGE.name, "exec"), found)
    return found


def test_hidden_states_are_matched(names: dict[str, Any]) -> None:
    assert names["pairs"] == [(1, 2), (2, 4)]
    assert [tuple(state.shape[-1:]) for state in names["hidden"].values()] == [(64,), (64,)]
    assert 0 < names["last"] < 10
    student: PreTrainedModel = names["classifier"]
    assert all(p.grad is not None for name, p in student.named_parameters() if "encoder.layer" in name)


def test_the_fused_losses_are_those_of_the_logits(names: dict[str, Any]) -> None:
    with torch.no_grad():
        logits, answers = (names[which](names["ids"]).logits for which in ("student", "teacher"))
    labels = next_token_labels(names["ids"])
    rows = labels != -100
    assert rows.sum() == 2 * 15
    assert torch.allclose(names["task"].value, cross_entropy(logits[rows], labels[rows]).value, atol=1e-5)
    plain = forward_kl(logits[rows], answers[rows], temperature=2.0).value
    assert torch.allclose(names["divergence"].value, plain, atol=1e-5)
    assert names["student"].lm_head.weight.grad is not None


def test_the_readme_leads_to_the_page() -> None:
    assert "docs/own_loop.md" in Path(ROOT / "README.md").read_text()
