"""A tiny recipe for every method, with what it needs beside its name: options, adapters, no student where it grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from toy_recipe import toy_recipe

from layerdistill.methods.table import METHODS
from layerdistill.models.projections import projection_paths

OPTIONS: dict[str, dict[str, Any]] = {
    "rail_kd": {"projection_size": 8},
    "lora_ild": {"rank": 4},
    "iskd": {"num_replaced": 2, "warmup_steps": 4, "block": {"hidden_size": 8}},
    "layer_prune": {"num_removed": 2, "calibration": {"examples": 16}},
    "l1_prune": {"removed": 0.2},
}
"""Options on the toy models; methods that are not here run with their defaults."""


def write_adapters(folder: Path, rank: int = 4) -> Path:
    """Save LoRA adapters for the toy teacher, which do something, as peft does."""
    model = tiny_model("bert", "sequence-classification", num_layers=4, hidden_size=32, num_heads=4, seed=5)
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=projection_paths(model)))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(folder)
    return folder


def method_recipe(folder: Path, method: str, **changes: Any) -> dict[str, Any]:
    """Write teacher, data and what else the method needs below `folder`, and return a toy recipe by which it runs."""
    recipe = toy_recipe(folder, method, **changes)
    recipe["method"] = {"name": method, **OPTIONS.get(method, {})}
    if METHODS[method].grows_student:
        del recipe["student"]
    if method == "lora_ild":
        adapters = folder / "adapters"
        recipe["teacher"]["adapters"] = str(adapters if adapters.exists() else write_adapters(adapters))
    return recipe
