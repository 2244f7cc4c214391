"""Find the query, key and value projections of every block, of any architecture, by the names of their modules."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layerdistill.core.errors import UserError
from layerdistill.core.types import StackName
from layerdistill.models.structure import find_stacks, unwrap

SPLIT_NAMES = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
"""What architectures call the three projections of an attention."""

FUSED_NAMES = ("c_attn", "query_key_value", "Wqkv", "qkv_proj")
"""What architectures call one matrix that makes queries, keys and values at once."""

SPLIT = ("query", "key", "value")
FUSED = "query_key_value"

BlockProjections = Mapping[str, str]
"""`query`, `key` and `value`, or `query_key_value` alone, each with its path in the unwrapped model."""


def find_projections(model: nn.Module) -> dict[StackName, tuple[BlockProjections, ...]]:
    """Return the projections of the self-attention of each block, in the blocks' order, for each stack.

    Cross-attention of a decoder is passed over. Works on models with and without LoRA, and on the meta device.
    Raises UserError when a block has none that are known by name.
    """
    inner = unwrap(model)
    found: dict[StackName, tuple[BlockProjections, ...]] = {}
    for name, stack in find_stacks(inner).items():
        blocks = []
        for path, block in zip(stack.block_names, stack.blocks, strict=True):
            projections = _projections_of(block)
            if not projections:
                raise UserError(
                    f"{type(inner).__name__} has no query, key and value projections in {path} that are known by name "
                    f"({'; '.join(', '.join(names) for names in SPLIT_NAMES)}; one matrix: {', '.join(FUSED_NAMES)}), "
                    "so it cannot get adapters there. Choose another method, such as kd."
                )
            blocks.append({role: f"{path}.{below}" for role, below in projections.items()})
        found[name] = tuple(blocks)
    return found


def projection_paths(model: nn.Module) -> list[str]:
    """Return the paths of all projections: stacks, blocks, then query, key, value."""
    return [path for blocks in find_projections(model).values() for block in blocks for path in block.values()]


def weight_matrix(module: nn.Module) -> Tensor:
    """Return a projection's weight as `(out_features, in_features)`, also where GPT-2 keeps it the other way round."""
    inner = getattr(module, "base_layer", module)
    weight: Tensor = inner.weight  # type: ignore[assignment]
    return weight.T if isinstance(inner, Conv1D) else weight


def _projections_of(block: nn.Module) -> dict[str, str]:
    """Return the first attention's projections in a block: a decoder has its self-attention before any other."""
    for path, module in block.named_modules():
        children = dict(module.named_children())
        prefix = f"{path}." if path else ""
        for names in SPLIT_NAMES:
            if all(name in children and _is_matrix(children[name]) for name in names):
                return {role: prefix + name for role, name in zip(SPLIT, names, strict=True)}
        for name in FUSED_NAMES:
            if name in children and _is_matrix(children[name]):
                return {FUSED: prefix + name}
    return {}


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2
