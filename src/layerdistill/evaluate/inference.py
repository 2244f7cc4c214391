"""How a model is called when nothing is learned: quietly, and with only the inputs that it knows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from layerdistill.models import evaluating

NOT_INPUTS = frozenset({"labels", "example_id"})
"""Columns of a batch that say what is true or which example it is; a model that sees them could use them."""


@contextmanager
def inference(model: nn.Module, device: torch.device | str | None = None) -> Iterator[torch.device]:
    """Put `model` in eval mode without gradients, on `device` if one is given, and put everything back afterwards.

    `no_grad` rather than `inference_mode`: a buffer that a model caches during the block stays usable in training.
    """
    home = device_of(model)
    target = home if device is None else torch.device(device)
    try:
        if target != home:
            model.to(target)
        with evaluating(model), torch.no_grad():
            yield target
    finally:
        if target != home:
            model.to(home)


def device_of(model: nn.Module) -> torch.device:
    """Return where the first parameter lies, which is where inputs have to go."""
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")


def text_config(model: nn.Module) -> Any:
    """Return the part of the model's configuration that is about text: vocabulary, positions, special tokens."""
    return cast(Any, model).config.get_text_config()


def forward_inputs(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return what `model.forward` names of `batch`, on `device`, without labels; `use_cache` is False where it exists.

    A student of another family may not know a column that its teacher needs (`token_type_ids`). A key-value cache would
    be memory that nothing here reads.
    """
    names = inspect.signature(model.forward).parameters
    takes_all = "input_ids" not in names
    inputs: dict[str, Any] = {
        name: value.to(device)
        for name, value in batch.items()
        if isinstance(value, Tensor) and name not in NOT_INPUTS and (takes_all or name in names)
    }
    if "use_cache" in names:
        inputs["use_cache"] = False
    return inputs
