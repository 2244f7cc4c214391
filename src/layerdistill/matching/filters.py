"""TED's filters: small maps, one per layer and model, that keep of a hidden state what the task needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.core.seeds import seeded
from layerdistill.core.types import LayerRef
from layerdistill.matching.projected import LinearMap, MapLinear, linear_product
from layerdistill.matching.rows import full_precision

FilterInit = Literal["normal", "identity"]

STANDARD_DEVIATION = 0.02
"""Of the weights at the start; what BERT and DeBERTa draw theirs from, and so the filters of TED's released code."""


class Filters(nn.Module):
    """One map `(..., width) -> (..., size)` for each layer, applied token by token (Liang et al. 2023, TED).

    Linear with bias, or Linear(width, width) - GELU - Linear(width, size) where `nonlinear`. `init` is `normal`
    (weights from N(0, 0.02^2), bias 0, as in the released code) or `identity` (the map that changes nothing; a
    deviation, for equal sizes and linear filters only). The draw depends on the seed, on `whose` and on the layer, and
    does not disturb torch's global generator. Called like `Projections`. Raises UserError for an identity that cannot
    be.
    """

    def __init__(
        self,
        layers: Sequence[LayerRef],
        width: int,
        size: int,
        *,
        init: FilterInit = "normal",
        nonlinear: bool = False,
        seed: int = 0,
        whose: str = "",
    ) -> None:
        super().__init__()
        if init == "identity" and (width != size or nonlinear):
            raise UserError(
                f"an identity filter is linear and changes no width, but this one maps {width} to {size}"
                f"{' through a GELU' if nonlinear else ''}. Use filter_init: normal."
            )
        self.layers = tuple(dict.fromkeys(layers))
        self.size = size
        self.nonlinear = nonlinear
        self.maps = nn.ModuleDict()
        for layer in self.layers:
            with seeded(seed, "filter", whose, layer):
                self.maps[self._name(layer)] = _make_filter(width, size, init, nonlinear)

    @property
    def linear(self) -> bool:
        """Whether the filters are linear maps, which `then` can be given."""
        return not self.nonlinear

    def forward(
        self, layer: LayerRef, hidden: Tensor, then: Callable[[Tensor, LinearMap], Any] = linear_product
    ) -> Any:
        """Return what the filter of `layer` makes of `hidden`; with `then`, what that makes of it and a linear filter.

        Computed in the filter's dtype (float32 unless it was cast); under autocast to bfloat16 a linear filter
        multiplies in it. Raises UserError for a layer that has no filter.
        """
        if layer not in self.layers:
            raise UserError(
                f"there is no filter for layer {layer}; there are filters for: {', '.join(map(str, self.layers))}."
            )
        chosen = self.maps[self._name(layer)]
        if self.linear:
            return chosen(hidden, then)
        with full_precision(hidden):
            return chosen(hidden.to(next(chosen.parameters()).dtype))

    @staticmethod
    def _name(layer: LayerRef) -> str:
        # A module's name may not hold a dot.
        return str(layer).replace(".", "_")


def _make_filter(width: int, size: int, init: FilterInit, nonlinear: bool) -> nn.Module:
    last = start_normal(MapLinear(width, size))
    if init == "identity":
        nn.init.eye_(last.weight)
    return nn.Sequential(start_normal(nn.Linear(width, width)), nn.GELU(), last) if nonlinear else last


@torch.no_grad()
def start_normal(linear: nn.Linear) -> nn.Linear:
    """Draw the weight from N(0, 0.02^2) and set the bias to 0, in place."""
    linear.weight.normal_(0.0, STANDARD_DEVIATION)
    linear.bias.zero_()
    return linear
