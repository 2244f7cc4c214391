"""In which order iskd replaces the blocks of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from layerdistill.core.errors import UserError
from layerdistill.core.seeds import random_for

Order = Literal["alternate", "paper-gpt2", "paper-phi1", "importance", "random"]

PAPER_ORDERS: dict[str, tuple[int, ...]] = {
    "paper-gpt2": (5, 7, 3, 9, 1, 11, 2, 10, 4, 8, 6, 0),
    "paper-phi1": (9, 1, 19, 15, 14, 7, 17, 8, 10, 11, 13, 20, 0, 4, 12, 18, 6, 21, 5, 2, 23, 3, 16, 22),
}
"""Blocks from 0, as in the scripts of Musaeus and van der Goot (COLING 2025); how they chose the second is not said."""


def block_order(
    order: Order | Sequence[int], depth: int, seed: int, importance: Callable[[], list[float]]
) -> list[int]:
    """Return the blocks (from 0) in the order in which they are replaced.

    `alternate`: the odd blocks from the middle outwards, then the even ones from the outside inwards, block 0 last;
    with 12 blocks this is `paper-gpt2`. `importance`: the least important first; `importance()` gives one number per
    block, more is more important. `random`: drawn from `seed`. A list is taken as it is.
    Raises UserError for a list or a paper's order that does not fit the depth.
    """
    if order == "alternate":
        return alternate(depth)
    if order == "random":
        blocks = list(range(depth))
        random_for(seed, "iskd-order").shuffle(blocks)
        return blocks
    if order == "importance":
        values = importance()
        return sorted(range(depth), key=lambda block: (values[block], block))
    if problem := order_problem(order, depth):
        raise UserError(problem)
    return list(PAPER_ORDERS[order] if isinstance(order, str) else order)


def alternate(depth: int) -> list[int]:
    """Return the odd blocks from the middle outwards, then the even ones from the outside inwards, 0 last."""
    odd, even = range(1, depth, 2), range(2, depth, 2)
    middle, of_even = (depth - 1) / 2, (2 + 2 * len(even)) / 2
    outwards = sorted(odd, key=lambda block: (abs(block - middle), block))
    inwards = sorted(even, key=lambda block: (-abs(block - of_even), block))
    return [*outwards, *inwards, 0]


def order_problem(order: Order | Sequence[int], depth: int) -> str | None:
    """Return why an order does not fit a model of `depth` blocks, or None."""
    if isinstance(order, str):
        length = len(PAPER_ORDERS.get(order, range(depth)))
        if length == depth:
            return None
        return (
            f"method.order is {order!r}, which is for {length} blocks; this model has {depth}. Write order: alternate."
        )
    wrong = sorted({block for block in order if not 0 <= block < depth})
    twice = sorted({block for block in order if list(order).count(block) > 1})
    if not wrong and not twice and order:
        return None
    return (
        f"method.order is {list(order)}"
        + (f", but {wrong} are no blocks: this model's are 0 to {depth - 1}" if wrong else "")
        + (f", but {twice} stand in it more than once" if twice else "")
        + ". List blocks counted from 0, each once."
    )
