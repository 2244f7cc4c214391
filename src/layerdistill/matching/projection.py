"""Maps from the student's width to the teacher's, used by a loss during training and thrown away after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from layerdistill.core.errors import UserError, one_of
from layerdistill.core.seeds import seeded
from layerdistill.core.types import LayerRef
from layerdistill.matching.projected import LinearMap, MapLinear, linear_product

ProjectionKind = Literal["identity", "linear", "frozen_random", "orthogonal"]
KINDS: tuple[str, ...] = get_args(ProjectionKind)


class Projections(nn.Module):
    """One linear map `(..., student_width) -> (..., teacher_width)` for each student layer, or one for all (`shared`).

    `identity` has no parameters and needs equal widths. `linear` is trained. `frozen_random` never changes (its weight
    is a buffer); both start from entries drawn from N(0, 1 / student_width), the same for the same seed and layer.
    `orthogonal` is trained and stays semi-orthogonal: it keeps lengths and angles when the teacher is wider, and
    projects orthogonally when it is narrower. `bias` starts at 0 and is for the trained kinds only.

    `shared` means one map for every layer and so for every matched pair, as in TinyBERT; the default is one for each
    student layer, which a layer matched with several teacher layers uses for all of them. The maps live outside the
    student: exporting the student leaves them behind. Initialisation does not disturb torch's global generator. Raises
    UserError for widths or options that do not fit the kind.
    """

    def __init__(
        self,
        kind: ProjectionKind,
        layers: Sequence[LayerRef],
        student_width: int,
        teacher_width: int,
        *,
        shared: bool = False,
        bias: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(kind, student_width, teacher_width, bias)
        self.kind = kind
        self.layers = tuple(dict.fromkeys(layers))
        self.shared = shared
        names = [] if kind == "identity" else list(dict.fromkeys(self._name(layer) for layer in self.layers))
        self.maps = nn.ModuleDict()
        for name in names:
            with seeded(seed, "projection", name):
                self.maps[name] = _make_map(kind, student_width, teacher_width, bias)

    @property
    def num_parameters(self) -> int:
        """How many trained numbers the maps have; all are discarded with them."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def linear(self) -> bool:
        """Whether there are maps, which `then` can be given."""
        return self.kind != "identity"

    def forward(
        self, layer: LayerRef, hidden: Tensor, then: Callable[[Tensor, LinearMap], Any] = linear_product
    ) -> Any:
        """Return the student's `hidden` `(..., student_width)` of `layer` in the teacher's width.

        Computed in the maps' dtype (float32 unless the module was cast); under autocast to bfloat16 multiplied in it;
        `identity` returns its input. With `then`, what that makes of `hidden` and the map. Raises UserError for a layer
        that has none.
        """
        if layer not in self.layers:
            known = ", ".join(str(known) for known in self.layers)
            raise UserError(f"there is no projection for layer {layer}; there are projections for: {known}.")
        return self.maps[self._name(layer)](hidden, then) if self.linear else hidden

    def _name(self, layer: LayerRef) -> str:
        # A module's name may not hold a dot.
        return "shared" if self.shared else str(layer).replace(".", "_")


class _FrozenLinear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, hidden: Tensor, then: Callable[[Tensor, LinearMap], Any]) -> Any:
        return then(hidden, LinearMap(self.get_buffer("weight")))


def _check(kind: str, student_width: int, teacher_width: int, bias: bool) -> None:
    if kind not in KINDS:
        raise UserError(one_of("projection", kind, KINDS))
    if kind == "identity" and student_width != teacher_width:
        raise UserError(
            f"projection 'identity' needs equal widths, but the student's hidden states are {student_width} wide and "
            f"the teacher's {teacher_width}: use projection 'linear', 'orthogonal' or 'frozen_random', or the cka loss."
        )
    if bias and kind not in ("linear", "orthogonal"):
        raise UserError(f"projection {kind!r} is not trained and has no bias: leave bias out, or use 'linear'.")


def _make_map(kind: ProjectionKind, student_width: int, teacher_width: int, bias: bool) -> nn.Module:
    weight = torch.randn(teacher_width, student_width) / student_width**0.5
    if kind == "frozen_random":
        return _FrozenLinear(weight)
    made = MapLinear(student_width, teacher_width, bias=bias)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias:
            made.bias.zero_()
    return parametrizations.orthogonal(made) if kind == "orthogonal" else made
