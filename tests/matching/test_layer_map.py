"""Layer maps: the tables of the papers' code, random draws that a resumed run repeats, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef
from layerdistill.matching import layer_map, map_rows

FORWARD_BLOCKS = {
    (12, 3): [3, 7, 11],
    (12, 6): [1, 3, 5, 7, 9, 11],
    (12, 9): [1, 2, 3, 5, 6, 7, 9, 10, 11],
    (36, 9): [3, 7, 11, 15, 19, 23, 27, 31, 35],
    (28, 7): [3, 7, 11, 15, 19, 23, 27],
    (40, 10): [3, 7, 11, 15, 19, 23, 27, 31, 35, 39],
    (24, 6): [3, 7, 11, 15, 19, 23],
}
"""(teacher blocks, student blocks): 0-based teacher blocks, as listed in the released code of Yu et al. and LoRAILD."""


def targets(strategy: str, student: int, teacher: int, **options: Any) -> list[int]:
    """The teacher layers of student layers 1, 2, ..."""
    pairs = layer_map(strategy, student, teacher, **options).pairs
    assert [layer for layer, _ in pairs] == list(range(1, student + 1))
    return [target for _, target in pairs]


@pytest.mark.parametrize(("depths", "blocks"), FORWARD_BLOCKS.items(), ids=str)
def test_forward_and_reverse_are_the_published_tables(depths: tuple[int, int], blocks: list[int]) -> None:
    teacher, student = depths
    layers = [block + 1 for block in blocks]
    assert targets("forward", student, teacher) == layers
    assert targets("reverse", student, teacher) == layers[::-1]


@pytest.mark.parametrize(("depths", "blocks"), FORWARD_BLOCKS.items(), ids=str)
def test_average_groups_are_contiguous_and_end_at_the_forward_target(
    depths: tuple[int, int], blocks: list[int]
) -> None:
    teacher, student = depths
    groups = layer_map("average", student, teacher).groups
    assert [group[-1] for _, group in groups] == [block + 1 for block in blocks]
    assert [layer for _, group in groups for layer in group] == list(range(1, teacher + 1))
    sizes = {len(group) for _, group in groups}
    assert max(sizes) - min(sizes) <= 1


def test_average_of_24_to_6_is_in_fours() -> None:
    found = layer_map("average", 6, 24)
    assert found.groups[:2] == ((1, (1, 2, 3, 4)), (2, (5, 6, 7, 8)))
    assert found.pairs[:5] == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 5)]


@pytest.mark.parametrize(("depths", "target"), [((12, 3), 6), ((12, 6), 6), ((12, 9), 6), ((36, 9), 18)], ids=str)
def test_all_to_one_is_the_published_layer_for_the_embeddings_too(depths: tuple[int, int], target: int) -> None:
    """hidden_states[6] of 12 for BERT, BART and T5, hidden_states[18] of 36 for Qwen3 (Yu et al.'s released code)."""
    teacher, student = depths
    assert layer_map("all_to_one", student, teacher).pairs == [(layer, target) for layer in range(1, student + 1)]
    with_embeddings = layer_map("all_to_one", student, teacher, embeddings=True)
    assert with_embeddings.pairs == [(layer, target) for layer in range(student + 1)]


@pytest.mark.parametrize(("depths", "blocks"), FORWARD_BLOCKS.items(), ids=str)
def test_random_is_one_permutation_of_the_forward_targets_for_a_whole_run(
    depths: tuple[int, int], blocks: list[int]
) -> None:
    teacher, student = depths
    found = layer_map("random", student, teacher, seed=4)
    assert sorted(target - 1 for _, target in found.pairs) == blocks
    assert all(found.at(epoch, step) == found.pairs for epoch, step in ((0, 0), (1, 50), (7, 999)))


def test_in_order_random_of_24_to_6_is_drawn_from_the_seed_and_the_epoch_alone() -> None:
    """What a resumed run needs: a map made anew, asked about a later epoch only, says what the first one said."""
    first = layer_map("in_order_random", 6, 24, seed=9, redraw="epoch")
    draws = [first.at(epoch, 1000 * epoch) for epoch in range(20)]
    for epoch in (19, 7, 0):
        assert layer_map("in_order_random", 6, 24, seed=9, redraw="epoch").at(epoch, 3) == draws[epoch]
    assert len({tuple(draw) for draw in draws}) > 15
    assert {target for draw in draws for _, target in draw} == set(range(1, 25)), "in time every teacher block teaches"


def test_all_to_one_goes_to_the_middle_or_where_it_is_told() -> None:
    assert targets("all_to_one", 3, 12) == [6, 6, 6]
    assert targets("all_to_one", 9, 36) == [18] * 9
    assert targets("all_to_one", 2, 12, all_to_one_target=12) == [12, 12]
    assert layer_map("all_to_one", 2, 12, embeddings=True).pairs == [(0, 6), (1, 6), (2, 6)]


def test_last_and_skip_are_those_of_pkd() -> None:
    assert targets("last", 6, 12)[:5] == [7, 8, 9, 10, 11]
    assert targets("last", 3, 12) == [10, 11, 12]
    assert targets("skip", 6, 12)[:5] == [block + 1 for block in (1, 3, 5, 7, 9)]
    assert targets("skip", 3, 12) == [4, 8, 12]
    assert targets("skip", 9, 12) == [1, 2, 4, 5, 6, 8, 9, 10, 12]


@pytest.mark.parametrize("strategy", ["forward", "reverse", "random", "in_order_random", "average", "last", "skip"])
def test_embeddings_are_matched_with_embeddings(strategy: str) -> None:
    without, with_embeddings = (layer_map(strategy, 3, 12, embeddings=flag) for flag in (False, True))
    assert with_embeddings.pairs == [(0, 0), *without.pairs]
    assert with_embeddings.groups[0] == (0, (0,))


def test_random_is_a_permutation_of_the_forward_targets() -> None:
    drawn = [targets("random", 6, 12, seed=seed) for seed in range(20)]
    assert all(sorted(draw) == [2, 4, 6, 8, 10, 12] for draw in drawn)
    assert len({tuple(draw) for draw in drawn}) > 15
    assert any(draw != sorted(draw) for draw in drawn)


def test_in_order_random_is_a_sorted_subset() -> None:
    drawn = [targets("in_order_random", 6, 24, seed=seed) for seed in range(20)]
    for draw in drawn:
        assert draw == sorted(set(draw))
        assert 1 <= draw[0] <= draw[-1] <= 24
    assert len({tuple(draw) for draw in drawn}) > 15
    assert {1, 24} <= {layer for draw in drawn for layer in draw}


@pytest.mark.parametrize("strategy", ["random", "in_order_random"])
@pytest.mark.parametrize("redraw", ["run", "epoch", "batch"])
def test_redraws_depend_on_where_training_is_and_on_nothing_else(strategy: str, redraw: Any) -> None:
    first, again = (layer_map(strategy, 6, 24, seed=5, redraw=redraw) for _ in range(2))
    other_stack = layer_map(strategy, 6, 24, seed=5, redraw=redraw, stack="decoder")
    places = [(epoch, 100 * epoch + step) for epoch in range(3) for step in range(4)]
    draws = {place: tuple(first.at(*place)) for place in places}
    assert draws == {place: tuple(again.at(*place)) for place in reversed(places)}
    assert draws == {place: tuple(other_stack.at(*place)) for place in places}
    assert len(set(draws.values())) == {"run": 1, "epoch": 3, "batch": 12}[redraw]
    assert first.pairs == first.at(0, 0)
    assert first.groups == first.groups_at(0, 0)
    assert first == again


def test_a_deeper_student_works_where_the_formula_does() -> None:
    assert targets("forward", 4, 3) == [1, 2, 3, 3]
    assert targets("reverse", 4, 3) == [3, 3, 2, 1]
    assert sorted(targets("random", 4, 3)) == [1, 2, 3, 3]
    assert layer_map("average", 4, 3).groups == ((1, (1,)), (2, (2,)), (3, (3,)), (4, (3,)))
    assert targets("all_to_one", 2, 1) == [1, 1]


@pytest.mark.parametrize("strategy", ["in_order_random", "last", "skip"])
def test_a_deeper_student_is_refused_where_there_are_too_few_layers(strategy: str) -> None:
    with pytest.raises(UserError, match="student has 4 blocks and the teacher 3"):
        layer_map(strategy, 4, 3)
    assert len(layer_map(strategy, 3, 3).pairs) == 3


def test_explicit_pairs_keep_their_order_and_may_name_the_stack() -> None:
    assert layer_map([(3, 12), (1, 4), (1, 5)], 3, 12).pairs == [(3, 12), (1, 4), (1, 5)]
    assert layer_map([["encoder.2", "encoder.8"], [1, "4"]], 3, 12, stack="encoder").pairs == [(2, 8), (1, 4)]
    assert layer_map([(1, 4)], 3, 12, embeddings=True).pairs == [(0, 0), (1, 4)]
    assert layer_map([(1, 4), (0, 0)], 3, 12, embeddings=True).pairs == [(1, 4), (0, 0)]
    final = layer_map([("final", "final")], 3, 12)
    assert final.refs_at(0, 0) == ((LayerRef("", -1), (LayerRef("", -1),)),)


def test_refs_name_the_stack() -> None:
    found = layer_map("average", 2, 4, stack="decoder")
    assert found.refs_at(0, 0) == (
        (LayerRef("decoder", 1), (LayerRef("decoder", 1), LayerRef("decoder", 2))),
        (LayerRef("decoder", 2), (LayerRef("decoder", 3), LayerRef("decoder", 4))),
    )


def test_rows_show_both_ways_to_count() -> None:
    rows = map_rows(layer_map("average", 2, 4, embeddings=True, stack="encoder"))
    assert rows == [
        ("encoder.0", "encoder.0", "embeddings", "embeddings"),
        ("encoder.1", "encoder.1, encoder.2", "0", "0, 1"),
        ("encoder.2", "encoder.3, encoder.4", "1", "2, 3"),
    ]
    assert map_rows(layer_map([("final", 12)], 3, 12)) == [("final", "12", "final norm", "11")]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("forwards", 3, 12), {}, "layer_map is 'forwards'.*Did you mean 'forward'"),
        (("explicit", 3, 12), {}, "layer_map is 'explicit'"),
        (("forward", 0, 12), {}, "student_layers is 0"),
        (("forward", 3, -1), {}, "teacher_layers is -1"),
        (("forward", 3, 12), {"redraw": "epoch"}, "redraw is 'epoch', but layer_map 'forward' draws nothing"),
        (([(1, 4)], 3, 12), {"redraw": "batch"}, "redraw is 'batch'"),
        (("random", 3, 12), {"redraw": "epochs"}, "redraw is 'epochs'.*Did you mean 'epoch'"),
        (("forward", 3, 12), {"all_to_one_target": 6}, "belongs to all_to_one only"),
        (("all_to_one", 3, 12), {"all_to_one_target": 13}, "is 13, but must be from 0 to 12: 0 = embedding"),
        (("forward", 3, 12), {"stack": "encoders"}, "stack is 'encoders'"),
        (([(4, 4)], 3, 12), {}, "student's layer in layer_map is 4, but must be from 0 to 3: 0 = embedding"),
        (([(1, 13)], 3, 12), {}, "teacher's layer in layer_map is 13, but must be from 0 to 12: 0 = embedding"),
        (([(1, -1)], 3, 12), {}, "layer -1 cannot be read"),
        (([(1, 4), (2, 8), ("1", 4)], 3, 12), {}, r"pair \(1, 4\) twice"),
        (([], 3, 12), {}, "empty list"),
        (([(1, 4, 5)], 3, 12), {}, r"holds \(1, 4, 5\)"),
        (([1, 4], 3, 12), {}, "holds 1, but"),
        ((["14"], 3, 12), {}, "holds '14', but"),
        (([("encoder.1", "encoder.2")], 3, 12), {}, "'encoder.1', but this is the map of a model with one stack"),
        (([("encoder.1", 2)], 3, 12), {"stack": "decoder"}, "'encoder.1', but this is the map of the decoder"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    arguments: tuple[Any, int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        layer_map(*arguments, **options)
