"""Where the texts of a batch go when they are laid end to end in fewer rows, so that little of these is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

WORTH = 0.9
"""A batch is packed where that takes less than this share of the work."""

ATTENTION = 6 * 384
"""Width of rows at which attention multiplies as much as the matrices of a block: six times a hidden size, this one."""

MULTIPLE = 8
"""Widths of packed rows are multiples of this."""

WIDTHS = 8
"""Widths that are tried, from the longest text to twice that."""

TEXTS = 8
"""Most texts on which it is tried whether a model says the same of them in packed rows."""

FEWEST_TOKENS = 16
"""Tokens, of two texts or more, below which such a try says too little."""


@dataclass(frozen=True)
class Packing:
    """A layout `(rows, width)` of the real tokens of a batch `(batch, seq)`, each text whole within one row.

    The width is never `seq`, so that a tensor's shape says which layout it has.

    `source` `(rows * width,)` is the number, counted over the batch's rectangle, of the token at each packed position,
    and `text` `(rows, width)` that of its text, -1 where nothing is left to put (some token then stands there, which
    sees only its like). `places` `(tokens,)` are the packed positions of the real tokens, text by text, `real`
    `(tokens,)` their numbers in the rectangle.
    """

    batch: int
    seq: int
    source: Tensor
    text: Tensor
    places: Tensor
    real: Tensor

    @property
    def rows(self) -> int:
        """The number of packed rows."""
        return self.text.shape[0]

    @property
    def width(self) -> int:
        """The number of positions in a packed row."""
        return self.text.shape[1]

    @cached_property
    def position(self) -> Tensor:
        """The column in the batch's rectangle of what stands at each packed position, `(rows, width)`."""
        return (self.source % self.seq).view_as(self.text)

    @cached_property
    def together(self) -> Tensor:
        """Whether two positions of a packed row belong to one text, `(rows, 1, width, width)`."""
        return (self.text.unsqueeze(2) == self.text.unsqueeze(1)).unsqueeze(1)

    def pack(self, values: Tensor) -> Tensor:
        """Return `(batch, seq, ...)`, or `(1, seq, ...)` that is the same for every text, as `(rows, width, ...)`."""
        rest = values.shape[2:]
        if values.shape[0] == self.batch:
            found = values.reshape(-1, *rest).index_select(0, self.source)
        else:
            found = values[0].index_select(0, self.position.flatten())
        return found.view(*self.text.shape, *rest)

    def pack_mask(self, mask: Tensor) -> Tensor:
        """Return an attention mask `(batch or 1, heads or 1, seq or 1, seq)` as `(rows, heads or 1, width, width)`.

        Within a text it is what it was, sliding windows and all; no text sees another.
        """
        whole = mask.expand(self.batch, -1, self.seq, -1)
        number = self.source.view_as(self.text) // self.seq
        found = whole[number.unsqueeze(2), :, self.position.unsqueeze(2), self.position.unsqueeze(1)]
        found = found.permute(0, 3, 1, 2)
        if found.dtype == torch.bool:
            return found & self.together
        return found.masked_fill(~self.together, torch.finfo(found.dtype).min)

    def is_laid_out(self, values: Tensor) -> bool:
        """Return whether values are laid out as the batch, `(batch, seq, ...)`, rather than packed."""
        return values.shape[:2] == (self.batch, self.seq)

    def tokens(self, values: Tensor) -> Tensor:
        """Return `(tokens, features)`, the real tokens, text by text, of `(rows, width, features)`.

        Or of `(batch, seq, features)`, as what comes after the blocks is.
        """
        chosen = self.real if self.is_laid_out(values) else self.places
        return values.reshape(-1, values.shape[-1]).index_select(0, chosen)

    def unpack(self, values: Tensor) -> Tensor:
        """Return `(rows, width, features)` as `(batch, seq, features)`, with zeros on padding."""
        if self.is_laid_out(values):
            return values
        found = values.new_zeros(self.batch * self.seq, values.shape[-1]).index_copy(0, self.real, self.tokens(values))
        return found.view(self.batch, self.seq, -1)


_FOUND = WeakTensorKeyDictionary()
"""Mask -> most positions of a row -> its packing: teacher and student of one batch share it."""


def worthwhile_packing(mask: Tensor, labels: Tensor | None = None, most: int | None = None) -> Packing | None:
    """Return how to pack a batch with the mask `(batch, seq)`, None where padding is too little to matter.

    None too where padding lies inside a text, or what is said of it is learned by `labels` `(batch, seq)`: it is no
    padding then; and for a batch on which no model could be tried, so that whether it is packed does not depend on the
    batches before it (a run that is resumed has not seen them). Rows have at most `most` positions.
    """
    if mask not in _FOUND:
        _FOUND[mask] = {}
    if most not in _FOUND[mask]:
        there = mask.cpu().ne(0)
        lengths, seq = there.sum(1).tolist(), there.shape[1]
        width = cheapest_width(lengths, seq, most) if sum(lengths) < WORTH * there.numel() else None
        worth = width is not None and _work(lengths, width) < WORTH * _positions_work(there.numel(), seq)
        packs = worth and in_one_piece(there) and not learns_padding(there, labels) and texts_to_try(lengths, most)
        _FOUND[mask][most] = pack_texts(there, width, mask.device) if packs and width is not None else None
    return _FOUND[mask][most]


def learns_padding(there: Tensor, labels: Tensor | None) -> bool:
    """Return whether a label `(batch, seq)` stands on padding, or on a token that padding before it is to foretell."""
    if labels is None or labels.shape != there.shape:
        return False
    learned = labels.cpu() >= 0
    return bool((learned & ~there).any() or (learned[:, 1:] & ~there[:, :-1]).any())


def texts_to_try(lengths: Sequence[int], most: int | None) -> list[int]:
    """Return the numbers of some texts of a batch, long ones first, which fit into a row as wide as two of the longest.

    Left out is a text beside which no other fits: a row has less than `most` positions. Empty where there are no two of
    them, or too few tokens for a verdict.
    """
    room = max(2 * max(lengths), 2 * FEWEST_TOKENS)
    room = min(room, (most or room + 1) - 1)
    longest = room - min(lengths)
    chosen: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if len(chosen) < TEXTS and lengths[number] <= min(room, longest):
            chosen.append(number)
            room -= lengths[number]
    enough = len(chosen) > 1 and sum(lengths[number] for number in chosen) >= FEWEST_TOKENS
    return chosen if enough else []


def in_one_piece(there: Tensor) -> bool:
    """Return whether each text has a token, and no padding between its tokens; `there` is `(batch, seq)`, bool."""
    starts = there[:, 0].int() + (there[:, 1:] & ~there[:, :-1]).sum(1)
    return bool((starts == 1).all())


def pack_texts(mask: Tensor, width: int, device: torch.device | None = None) -> Packing:
    """Return a packing of the real tokens of `mask` `(batch, seq)` into rows of `width`, on a device, else the mask's.

    Texts are placed from the longest to the shortest, each in the fullest row that has room (best fit decreasing).
    """
    there = mask.cpu().ne(0)
    lengths = there.sum(1)
    rows, starts = best_fit(lengths.tolist(), width)
    real = there.flatten().nonzero().squeeze(1)
    text = real // there.shape[1]
    before = lengths.cumsum(0) - lengths
    places = torch.tensor(starts)[text] + torch.arange(len(real)) - before[text]
    source = real[:1].repeat(rows * width)
    source[places] = real
    owner = torch.full((rows * width,), -1)
    owner[places] = text
    found = (tensor.to(device or mask.device) for tensor in (source, owner.view(rows, width), places, real))
    return Packing(*there.shape, *found)


def best_fit(lengths: Sequence[int], width: int) -> tuple[int, list[int]]:
    """Return the number of rows of `width`, and where each text starts in them, counted over all rows."""
    free: list[tuple[int, int]] = []
    starts = [0] * len(lengths)
    rows = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fullest = bisect_left(free, (lengths[number], 0))
        if fullest == len(free):
            free.append((width, rows))
            rows += 1
        left, row = free.pop(fullest)
        starts[number] = (row + 1) * width - left
        insort(free, (left - lengths[number], row))
    return rows, starts


def cheapest_width(lengths: Sequence[int], seq: int, most: int | None = None) -> int | None:
    """Return the width, not `seq` and at most `most`, of rows into which texts are packed with the least work.

    A multiple of 8; None where no such width holds the longest text.
    """
    longest = -(-max(lengths) // MULTIPLE) * MULTIPLE
    step = max(longest // WIDTHS // MULTIPLE, 1) * MULTIPLE
    widths = range(longest, min(2 * longest, most or 2 * longest) + 1, step)
    return min((width for width in widths if width != seq), key=lambda width: _work(lengths, width), default=None)


def _work(lengths: Sequence[int], width: int) -> float:
    return _positions_work(best_fit(lengths, width)[0] * width, width)


def _positions_work(positions: int, width: int) -> float:
    """Return what the matrices and the attention of a block multiply, in positions of a block without attention."""
    return positions * (1 + width / ATTENTION)
