"""`load_student` opens what a run left, with its head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_batch, tiny_model

import layerdistill as ld


@pytest.mark.parametrize(("family", "head"), [("bert", "sequence-classification"), ("gpt2", "causal-lm")])
@pytest.mark.parametrize("inside", [True, False])
def test_a_saved_student_is_the_same_model(tmp_path: Path, family: str, head: str, inside: bool) -> None:
    model = tiny_model(family, head)
    model.save_pretrained(tmp_path / "student" if inside else tmp_path)
    again = ld.load_student(tmp_path)
    assert type(again) is type(model)
    assert not again.training
    batch = tiny_batch(model)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_what_is_no_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ld.UserError, match=r"config\.json|configuration"):
        ld.load_student(tmp_path)
    tiny_model("bert", "base").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("BertModel", "BertModle"))
    with pytest.raises(ld.UserError, match="BertModle"):
        ld.load_student(tmp_path)
