"""Every method trains the same student whether blocks run on packed texts or on padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_cases import OPTIONS, distilled

from layerdistill.methods.table import METHODS
from layerdistill.signals import packing

FAMILIES = ("bert", "gpt2", "llama", "modernbert")
"""Learned positions and rotary ones, both directions and one, windows and none."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_packed_texts_teach_the_same(method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONS, "lora_ild", {**OPTIONS["lora_ild"], "dropout": 0.0})  # it is drawn by position
    packed = []
    real = packing.pack_texts

    def counted(*given: object) -> packing.Packing:
        packed.append(given)
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "pack_texts", counted)
    students = []
    for padding_free in (False, True):
        _, student = distilled(
            method, family, tmp_path / str(padding_free), 2, padding_free=padding_free, optim="sgd",
            max_grad_norm=0.0, train_sampling_strategy="random",
        )  # fmt: skip
        students.append(student.state_dict())
        assert bool(packed) == padding_free
    plain, found = students
    assert plain.keys() == found.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
