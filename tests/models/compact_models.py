"""Tiny models with compact blocks in some places, for the tests of what they do and how they are saved."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import DECODERS, tiny_model
from transformers import PreTrainedModel

from layerdistill.models.compact import CompactShape, describe_compact, new_compact_block, put_compact_block


def with_compact_blocks(model: PreTrainedModel, *replaced: int, **shape: Any) -> PreTrainedModel:
    """Put compact blocks into `model`; noise on every parameter, so that no bias is 0."""
    description = describe_compact(model, CompactShape(**shape))
    generator = torch.Generator().manual_seed(5)
    for number in replaced:
        block = new_compact_block(model, description, number, seed=3)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        description = put_compact_block(model, description, number, block)
    return model.eval()


def compact_model(family: str, *replaced: int, head: str | None = None, **shape: Any) -> PreTrainedModel:
    """A tiny model of four blocks, some of them compact, with the head that its family is tested with."""
    chosen = head or ("causal-lm" if family in DECODERS else "sequence-classification")
    return with_compact_blocks(tiny_model(family, chosen, hidden_size=48), *(replaced or (2, 0, 3)), **shape)
