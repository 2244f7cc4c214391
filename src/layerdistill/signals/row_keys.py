"""What an example is known by in a record or a cache of what a model says: its content."""

from __future__ import annotations

import hashlib

import torch

from layerdistill.core.types import Batch


def row_keys(batch: Batch) -> list[bytes]:
    """Return what each row of a batch is known by: a digest of its real token ids and token types."""
    ids = batch["input_ids"].cpu()
    mask = batch["attention_mask"].cpu().bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
    columns = [batch[name].cpu() for name in ("input_ids", "token_type_ids") if name in batch]
    return [
        hashlib.blake2b(
            b"".join(column[row][mask[row]].contiguous().numpy().tobytes() for column in columns), digest_size=16
        ).digest()
        for row in range(len(ids))
    ]
