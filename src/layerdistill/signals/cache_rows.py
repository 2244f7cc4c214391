"""How the rows of a signal are kept on the disk: in 16 or 32 bits, or in 8 with a scale for each row."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from layerdistill.core.errors import UserError

StoredDtype = Literal["float32", "float16", "bfloat16", "int8"]

LARGEST_INT8 = 127

TOKENS = "tokens:"
"""How the names of signals begin that are token ids; they are kept as they are."""

LOG_PROBABILITIES = "log_probabilities:"
"""How the names of signals begin that are log-probabilities; they are kept in float16, or in float32 if all is."""


def stored_bytes(width: int, dtype: StoredDtype) -> int:
    """Return the bytes of one row of `width` numbers, its scale included."""
    return width + 4 if dtype == "int8" else width * getattr(torch, dtype).itemsize


def encode(rows: Tensor, dtype: StoredDtype) -> tuple[Tensor, Tensor | None]:
    """Return rows `(n, width)` as they are kept, and for int8 the scale `(n,)`, float32, that each is divided by.

    The scale of a row is its largest magnitude / 127, so that an entry is off by at most half of that. Raises UserError
    for numbers that the dtype cannot hold.
    """
    if not rows.is_floating_point():
        return rows, None
    if dtype == "int8":
        values = rows.float()
        scale = values.abs().amax(-1) / LARGEST_INT8
        if not scale.isfinite().all():
            raise UserError(overflow(dtype))
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
        return (values / divisor.unsqueeze(-1)).round_().to(torch.int8), scale
    kept = rows.to(getattr(torch, dtype))
    if not kept.isfinite().all():
        raise UserError(overflow(dtype))
    return kept, None


def token_dtype(vocab_size: int | None) -> torch.dtype:
    """Return the smallest dtype that holds the ids of a vocabulary."""
    return torch.uint16 if vocab_size is not None and vocab_size <= 2**16 else torch.int32


def decode(kept: Tensor, scale: Tensor | None) -> Tensor:
    """Return kept rows `(n, width)` as numbers: float32 from int8, else in the dtype they are kept in."""
    return kept if scale is None else kept.float() * scale.unsqueeze(-1)


def overflow(dtype: StoredDtype) -> str:
    """Return the message for a teacher whose numbers do not fit."""
    return (
        f"What the teacher says (states, log-probabilities) holds numbers that {dtype} cannot: infinite, not a number, "
        "or beyond its range. So it cannot be cached. Write teacher.cache_dtype: bfloat16 or float32; if that fails "
        "too, the teacher itself gives infinite numbers."
    )
