"""Sums over processes through which gradients flow."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def differentiable_sum() -> Callable[[Tensor], Tensor] | None:
    """Return a function that sums a tensor over all processes, or None in a single process.

    The gradient of the sum reaches every process's summand. Each process computes the same loss from the sums, and
    DistributedDataParallel averages the processes' gradients, so the result is the gradient of one global batch.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return all_reduce
    return None
