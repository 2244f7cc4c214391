"""LoRA adapters on the query, key and value projections: put them into a model, read them, merge them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layerdistill.core.errors import UserError
from layerdistill.core.seeds import seeded
from layerdistill.models.projections import projection_paths, weight_matrix
from layerdistill.models.structure import unwrap

ADAPTER = "default"
"""peft's name for the adapter; `<path>.lora_A.default` is the module whose output is compared."""


def add_adapters(model: nn.Module, rank: int, alpha: float, dropout: float, seed: int) -> list[str]:
    """Put LoRA of `rank` into `model`, in place, at every block's projections, and return their paths.

    A is drawn from `seed` as peft does (Kaiming-uniform), B is 0. A model with one matrix for query, key and value gets
    one adapter for the three. All parameters but A and B are frozen. Raises UserError where there is an adapter.
    """
    inner = unwrap(model)
    if adapted_layers(inner):
        raise UserError("the model has LoRA adapters already: merge them first, with merge_and_unload().")
    paths = projection_paths(inner)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a fraction is as good as a whole number
        lora_dropout=dropout,
        bias="none",
        target_modules=list(paths),
        fan_in_fan_out=all(isinstance(inner.get_submodule(path), Conv1D) for path in paths),
    )
    with seeded(seed, "adapters"):
        inject_adapter_in_model(config, inner, ADAPTER)
    assert set(adapted_layers(inner)) == set(paths), "peft adapts the modules that it is told to"
    return paths


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the modules that have an adapter (peft's `LoraLayer`), by their paths in the unwrapped model."""
    return {path: module for path, module in unwrap(model).named_modules() if isinstance(module, LoraLayer)}


def adapter_matrices(model: nn.Module, adapter: str = ADAPTER) -> dict[str, tuple[Tensor, Tensor]]:
    """Return copies on the CPU of A `(rank, in_features)` and B `(out_features, rank)` by module path."""
    return {
        path: (layer.lora_A[adapter].weight.detach().cpu().clone(), layer.lora_B[adapter].weight.detach().cpu().clone())
        for path, layer in adapted_layers(model).items()
        if adapter in layer.lora_A
    }


def peft_adapters(model: nn.Module | None) -> dict[str, Tensor] | None:
    """Return the A matrices of a model that is wrapped in peft, by module path; None for one that is not.

    Raises UserError for adapters of another kind than LoRA, and for several at once.
    """
    if not isinstance(model, PeftModel):
        return None
    kind = model.peft_config[model.active_adapter].peft_type if isinstance(model.active_adapter, str) else None
    if kind != "LORA":
        raise UserError(
            f"The teacher is wrapped in peft with the active adapter {model.active_adapter!r}, of the kind {kind}: one "
            "LoRA adapter is needed. Merge it with merge_and_unload() and pass the result, or make LoRA active."
        )
    return {path: a for path, (a, _) in adapter_matrices(model, model.active_adapter).items()}


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add every `(alpha / rank) B A` to its weight, in place, and leave the plain model: its own modules and keys only.

    Done on the CPU, so that a run that goes on elsewhere gives the same numbers.
    """
    inner = unwrap(model)
    for path, layer in adapted_layers(inner).items():
        base = layer.get_base_layer()
        place = base.weight.device
        layer.to("cpu")
        layer.merge(safe_merge=True)
        parent, _, name = path.rpartition(".")
        setattr(inner.get_submodule(parent), name, base.to(place))
    if hasattr(inner, "peft_config"):
        del inner.peft_config


def train_adapters_and_head(model: nn.Module) -> None:
    """Let A, B and the task's head train and freeze the rest.

    The head is what stands outside the base model, with any pooler in it; a language model's head is pretrained, often
    tied to the embeddings, and stays frozen.
    """
    inner = unwrap(model)
    has_language_head = inner.get_output_embeddings() is not None
    body = set() if inner.base_model is inner else {id(parameter) for parameter in inner.base_model.parameters()}
    for name, parameter in inner.named_parameters():
        is_head = not has_language_head and (id(parameter) not in body or "pooler" in name.split("."))
        parameter.requires_grad_(is_head or ".lora_A." in name or ".lora_B." in name)


def count_adapter_parameters(model: nn.Module, rank: int) -> int:
    """Return how many parameters adapters of `rank` would add: `rank (in + out)` per projection."""
    inner = unwrap(model)
    return sum(rank * sum(weight_matrix(inner.get_submodule(path)).shape) for path in projection_paths(inner))


def empty_adapters(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Return A matrices of `rank` for every projection on the meta device: shapes without numbers."""
    inner = unwrap(model)
    sizes = {path: weight_matrix(inner.get_submodule(path)).shape[1] for path in projection_paths(inner)}
    return {path: torch.empty(rank, size, device="meta") for path, size in sizes.items()}


def balanced_svd(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A `(rank, in)` and B `(out, rank)` whose product B A is the best rank-`rank` part of `update` `(out, in)`.

    With `update = U S V^T`: `A = S^(1/2) V^T`, `B = U S^(1/2)`. A is defined only up to an invertible matrix; this
    choice, with each row's entry of largest size positive, is ours. Raises UserError for a rank above min(out, in).
    """
    if rank > min(update.shape):
        raise UserError(
            f"method.rank is {rank}, but the update of a projection of {tuple(update.shape)} has at most the rank "
            f"{min(update.shape)}. Take a smaller rank."
        )
    values = update if update.dtype == torch.float64 else update.float()
    u, s, vt = torch.linalg.svd(values, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    signs = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True)).sign()
    root = s.sqrt()
    return root[:, None] * vt * signs, u * root * signs.T


@torch.no_grad()
def svd_adapters(finetuned: nn.Module, pretrained: nn.Module, rank: int) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Return A and B of what a full fine-tuning did to each projection, by module path."""
    found = {}
    for path in projection_paths(finetuned):
        after, before = (weight_matrix(unwrap(model).get_submodule(path)) for model in (finetuned, pretrained))
        found[path] = balanced_svd(after.float().cpu() - before.float().cpu(), rank)
    return found
