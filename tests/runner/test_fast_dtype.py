"""A teacher of dtype `fast`: rounded where that is fast, and never before a student was cut out of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from toy_recipe import toy_recipe

from layerdistill import finetune
from layerdistill.models import fast_dtype as module
from layerdistill.models.fast_dtype import fast_dtype
from layerdistill.runner import run


@pytest.mark.parametrize(
    ("abilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "bfloat16"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"avx512_f": True, "avx2": True, "avx512_bf16": False}, "float32"),
        ({}, "float32"),
    ],
)
def test_bfloat16_where_the_processor_multiplies_it(
    abilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module.torch.cpu, "get_capabilities", lambda: abilities)
    assert fast_dtype() == expected


@pytest.mark.parametrize("chosen", ["bfloat16", "float32"])
def test_the_teacher_is_rounded_after_the_student_was_cut_out(
    chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "fast_dtype", lambda: chosen)
    recipe = toy_recipe(tmp_path, "kd", student={"num_blocks": 2})
    recipe["teacher"]["dtype"] = "fast"
    recipe["training"]["learning_rate"] = 1e-12
    console = Console(record=True, width=300, file=(tmp_path / "said").open("w"))
    result = run(recipe, console=console)
    assert f"The teacher runs in {chosen}" in console.export_text()
    student = load_file(result.student / "model.safetensors")
    teacher = load_file(tmp_path / "teacher" / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.allclose(student[name], teacher[name], atol=1e-9), "float32 weights, not rounded ones"
    assert not torch.allclose(student[name], teacher[name].bfloat16().float(), atol=1e-9)
