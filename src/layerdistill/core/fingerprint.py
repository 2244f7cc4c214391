"""Content fingerprints: the same content gives the same short name on every machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

LENGTH = 16
"""Hex digits kept of a SHA-256; 64 bits are ample for the few thousand things one user makes."""


def fingerprint_json(value: Any) -> str:
    """Return the fingerprint of anything JSON can hold, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def fingerprint_files(paths: list[Path]) -> str:
    """Return the fingerprint of the contents of `paths`, in the order given; names do not count."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()[:LENGTH]


def fingerprint_model(model: nn.Module) -> str:
    """Return the fingerprint of every parameter and buffer (name, shape and bytes) of `model`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:LENGTH]
