"""Rows of real tokens laid out in the rectangle of a batch, with zeros on padding."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

from layerdistill.core.types import LayerRef, StackName


class LaidOut(Mapping[LayerRef, Tensor]):
    """Hidden states `(batch, seq, hidden)`, made of `(tokens, hidden)` when they are asked for: most terms do not."""

    def __init__(
        self,
        rows: Mapping[LayerRef, Tensor],
        masks: Mapping[StackName, Tensor],
        whole: Mapping[LayerRef, Tensor] | None = None,
    ) -> None:
        """`whole` are layers that are laid out already."""
        self.rows = rows
        self.masks = masks
        self.whole = whole or {}

    def __getitem__(self, layer: LayerRef) -> Tensor:
        if layer in self.whole:
            return self.whole[layer]
        return spread(self.rows[layer], self.masks[layer.stack])

    def only(self, layers: Collection[LayerRef]) -> LaidOut:
        """Return the same with `layers` alone."""
        rows, whole = ({layer: of[layer] for layer in of if layer in layers} for of in (self.rows, self.whole))
        return LaidOut(rows, self.masks, whole)

    def __iter__(self) -> Iterator[LayerRef]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def spread(rows: Tensor, mask: Tensor) -> Tensor:
    """Return `(batch, seq, width)`: `rows` `(tokens, width)` where `mask` `(batch, seq)` is not 0, else zeros."""
    width = rows.shape[1]
    if len(rows) == mask.numel():
        return rows.view(*mask.shape, width)
    padded = rows.new_zeros(mask.numel(), width)
    padded.index_copy_(0, mask.reshape(-1).nonzero().squeeze(1), rows)
    return padded.view(*mask.shape, width)
