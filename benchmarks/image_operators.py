"""Makes torchvision importable where its wheel does not fit: importing this module is all there is to it.

torchvision comes with torchdistill, and its wheels on the package index are built for CUDA. Beside a build of torch for
processors alone its operators do not load; it then fails on import, and transformers, which imports it where it is
installed, with it. Nothing here works on images, so the operators that it asks for are declared without a body.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

if find_spec("torchvision") is not None:
    try:
        import_module("torchvision")
    except RuntimeError:
        LIBRARY = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            LIBRARY.define(operator)
        import_module("torchvision")
