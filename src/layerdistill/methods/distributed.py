"""Sums over processes through which gradients flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    """torch.distributed.nn.functional.all_reduce does the same, but is deprecated and warns at every step."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(tensor: Tensor) -> Tensor:
    whole = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole)
    return whole


def differentiable_sum() -> Callable[[Tensor], Tensor] | None:
    """Return a function that sums a tensor over all processes, or None in a single process.

    The gradient of the sum reaches every process's summand. Each process computes the same loss from the sums, and
    DistributedDataParallel averages the processes' gradients, so the result is the gradient of one global batch.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _Sum.apply
    return None
