"""What terms will read during a training is known before it begins."""

from __future__ import annotations

from layerdistill.core.needs import needs_during
from layerdistill.core.types import LayerRef, Needs, Progress
from layerdistill.matching import layer_map


class Drawn:
    """A term whose map is drawn anew for each epoch or batch."""

    def __init__(self, redraw: str) -> None:
        self.map = layer_map("in_order_random", student_layers=2, teacher_layers=12, seed=3, redraw=redraw)

    def needs(self, progress: Progress) -> Needs:
        groups = self.map.refs_at(progress.epoch, progress.step)
        return Needs(teacher=frozenset(layer for _, group in groups for layer in group))


def test_a_map_of_each_epoch_asks_for_the_layers_of_these_epochs_and_no_more() -> None:
    term = Drawn("epoch")
    expected = set().union(*(term.needs(Progress(epoch, 7 * epoch)).teacher for epoch in range(3)))
    assert needs_during([term], epochs=3, steps_per_epoch=7).teacher == expected
    assert len(expected) < 12


def test_a_map_of_each_batch_asks_for_every_layer_before_long() -> None:
    asked = needs_during([Drawn("batch")], epochs=3, steps_per_epoch=1000).teacher
    assert asked == {LayerRef("", number) for number in range(1, 13)}


def test_terms_are_put_together() -> None:
    asked = needs_during([Drawn("run"), Drawn("epoch")], epochs=1, steps_per_epoch=5)
    assert asked.teacher == Drawn("run").needs(Progress()).teacher | Drawn("epoch").needs(Progress()).teacher
