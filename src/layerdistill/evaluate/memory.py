"""How much memory a forward needs at its worst moment."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_allocation(forward: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that `forward` holds at once beyond what is there before it.

    On CUDA this is the allocator's own count (`torch.cuda.max_memory_allocated`, kernel workspaces included). Elsewhere
    it is the storage of all tensors that operators return, followed from birth to release; scratch space inside an
    operator and memory that the allocator keeps for later are not in it, so the process as a whole needs more.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        forward()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Inside its `with` block, counts the bytes of the tensors made there: alive `now`, and at the `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and count the storages of its results that are not those of its arguments."""
        result = func(*args, **(kwargs or {}))
        # A view, or a tensor changed in place, lies where its argument lies and takes nothing.
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                known.add(leaf.untyped_storage().data_ptr())
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self.now -= size
