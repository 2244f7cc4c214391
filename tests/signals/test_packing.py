"""Texts laid end to end: whole, apart, in few rows, and back where they were."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from layerdistill.signals.packing import (
    ATTENTION,
    Packing,
    best_fit,
    cheapest_width,
    in_one_piece,
    pack_texts,
    texts_to_try,
    worthwhile_packing,
)


def mask_of(lengths: list[int], seq: int, left: bool = False) -> Tensor:
    mask = torch.zeros(len(lengths), seq, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, seq - length if left else 0 : seq if left else length] = 1
    return mask


@pytest.mark.parametrize("seed", range(20))
def test_every_text_is_whole_within_one_row_and_overlaps_no_other(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 40) for _ in range(draw.randint(1, 60))]
    width = max(lengths) + draw.randint(0, 30)
    rows, starts = best_fit(lengths, width)
    taken = [False] * (rows * width)
    for start, length in zip(starts, lengths, strict=True):
        assert start // width == (start + length - 1) // width
        assert not any(taken[start : start + length])
        taken[start : start + length] = [True] * length
    fewest = -(-sum(lengths) // width)
    assert fewest <= rows <= 11 / 9 * max(fewest, 1) + sum(length > width / 2 for length in lengths) + 1


def test_rows_are_filled_where_texts_fit_exactly() -> None:
    assert best_fit([6, 4, 7, 3, 10], 10)[0] == 3


@pytest.mark.parametrize("left", [False, True])
def test_what_is_packed_comes_back_where_it_was(left: bool) -> None:
    mask = mask_of([3, 9, 1, 5, 4], 9, left)
    states = torch.randn(5, 9, 2, requires_grad=True)
    packing = pack_texts(mask, 10)
    assert (packing.rows, packing.width) == (3, 10)
    packed = packing.pack(states)
    assert packed.shape == (3, 10, 2)
    expected = states.detach() * mask.unsqueeze(-1)
    torch.testing.assert_close(packing.unpack(packed).detach(), expected, atol=0, rtol=0)
    rows = states.detach()[mask.bool()]
    torch.testing.assert_close(packing.tokens(packed).detach(), rows, atol=0, rtol=0)
    torch.testing.assert_close(packing.tokens(states).detach(), rows, atol=0, rtol=0)
    packing.unpack(packed).sum().backward()
    assert states.grad is not None
    torch.testing.assert_close(states.grad, mask.unsqueeze(-1).expand(-1, -1, 2).float(), atol=0, rtol=0)


def test_tensors_that_are_the_same_for_every_text_follow_their_tokens() -> None:
    mask = mask_of([3, 5], 6)
    angles = torch.arange(6).unsqueeze(0)
    packing = pack_texts(mask, 8)
    assert packing.pack(angles).flatten()[packing.places].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_packed_mask_is_the_old_one_within_a_text_and_shut_between_texts(dtype: torch.dtype, heads: int) -> None:
    draw = torch.Generator().manual_seed(0)
    mask = mask_of([3, 6, 2, 4], 6, left=True)
    own: Tensor = torch.randn(4, heads, 6, 6, generator=draw)
    own = own > 0 if dtype == torch.bool else own
    packing = pack_texts(mask, 7)
    found = packing.pack_mask(own)
    assert found.shape == (packing.rows, heads, 7, 7)
    where = {}
    for place, source in zip(packing.places.tolist(), packing.real.tolist(), strict=True):
        where[place] = divmod(source, 6)
    shut = False if dtype == torch.bool else torch.finfo(dtype).min
    for row in range(packing.rows):
        for i in range(7):
            for j in range(7):
                first, second = where.get(row * 7 + i), where.get(row * 7 + j)
                if first is None or second is None:
                    continue
                for head in range(heads):
                    together = first[0] == second[0]
                    expected = own[first[0], head, first[1], second[1]].item() if together else shut
                    assert found[row, head, i, j].item() == expected


def test_no_position_is_left_without_one_to_attend_to() -> None:
    mask = mask_of([3, 6, 2], 6)
    causal = torch.ones(6, 6).tril().bool() & mask[:, None, None, :].bool()
    packing = pack_texts(mask, 7)
    assert (packing.text < 0).any(), "the case has positions that are left over"
    assert packing.pack_mask(causal).any(-1).all()


def test_masks_without_an_axis_of_queries_are_packed_too() -> None:
    mask = mask_of([2, 4], 4)
    packing = pack_texts(mask, 6)
    found = packing.pack_mask(mask[:, None, None, :].bool())
    assert found[0, 0, :2].sum() == 2 * 2 or found[0, 0, :4].sum() == 4 * 4


def test_a_batch_is_packed_where_that_saves_a_tenth() -> None:
    assert worthwhile_packing(mask_of([8, 8, 8, 7], 8)) is None
    assert worthwhile_packing(mask_of([16], 16)) is None
    found = worthwhile_packing(mask_of([16, 2, 3, 4, 2, 5], 16))
    assert found is not None
    assert found.rows * found.width < 0.5 * 6 * 16


def test_a_model_is_tried_on_enough_long_texts_or_its_batch_is_not_packed() -> None:
    assert texts_to_try([5] * 8, None) == [0, 1, 2, 3, 4, 5], "two texts of five tokens would say too little"
    assert texts_to_try([2, 20, 4, 6], None) == [1, 3, 2, 0]
    assert texts_to_try([2, 20, 4, 30], 32) == [1, 2, 0], "beside the longest there is room for none"
    assert texts_to_try([505, 120, 100, 90, 80, 60, 60, 50], 512) == [1, 2, 3, 4, 5, 6]
    assert texts_to_try([30, 20, 17], 32) == []
    assert texts_to_try([4, 1, 2], None) == []
    assert worthwhile_packing(mask_of([4, 1, 2], 8)) is None
    assert worthwhile_packing(mask_of([5] * 8, 8)) is not None


def test_the_width_is_never_that_of_the_batch() -> None:
    for longest in range(1, 70):
        assert cheapest_width([longest, 1], 64) != 64


def test_wider_rows_are_taken_where_they_leave_less_over_and_not_for_nothing() -> None:
    assert cheapest_width([64] * 10, 128) == 64
    assert cheapest_width([40] * 30, 128) % 40 == 0
    assert cheapest_width([ATTENTION], 2 * ATTENTION) == ATTENTION
    assert cheapest_width([60, 33, 33], 60, most=64) == 64
    assert cheapest_width([64, 2], 64, most=64) is None


def test_padding_that_is_none_is_left_where_it_is() -> None:
    mask = mask_of([16, 2, 3, 4, 2, 5], 16)
    labels = torch.full_like(mask, -100)
    labels[:, 1] = 3
    assert worthwhile_packing(mask.clone(), labels) is not None
    labels[1, 9] = 3
    assert worthwhile_packing(mask.clone(), labels) is None
    foretold = mask_of([16, 2, 3, 4, 2, 5], 16, left=True)
    assert worthwhile_packing(foretold.clone()) is not None
    first = torch.where(foretold.bool(), 3, -100)
    assert worthwhile_packing(foretold.clone(), first) is None, "padding on the left foretells the first token"
    holed = mask.clone()
    holed[0, 5] = 0
    assert worthwhile_packing(holed) is None
    empty = mask.clone()
    empty[1] = 0
    assert worthwhile_packing(empty) is None
    assert in_one_piece(mask.bool())
    assert not in_one_piece(holed.bool())


def test_teacher_and_student_of_a_batch_share_its_packing() -> None:
    mask = mask_of([16, 2, 3, 4, 2, 5], 16)
    first: Packing | None = worthwhile_packing(mask)
    assert first is not None
    assert worthwhile_packing(mask) is first
    assert worthwhile_packing(mask.clone()) is not first
