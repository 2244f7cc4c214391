"""Count parameters; works on models without weights (meta device) as well."""

from __future__ import annotations

from torch import nn


def count_parameters(model: nn.Module, embeddings: bool = True) -> dict[str, int]:
    """Return the number of parameters: `total`, `embedding`, `non_embedding`, `trainable`.

    `embedding` counts every `nn.Embedding` (tokens, positions, types); tied tensors count once, as an embedding.
    With `embeddings=False`, `total` and `trainable` leave them out.
    """
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    embedding = sum(weight.numel() for weight in tables.values())
    counted = [p for p in model.parameters() if embeddings or id(p) not in tables]
    total = sum(p.numel() for p in model.parameters())
    return {
        "total": sum(p.numel() for p in counted),
        "embedding": embedding,
        "non_embedding": total - embedding,
        "trainable": sum(p.numel() for p in counted if p.requires_grad),
    }
