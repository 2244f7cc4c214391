"""The curriculum's coefficients over the epochs, written out by hand from the released code's rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerdistill.core.types import Batch, LayerRef, Mean, Needs, Progress, Signal
from layerdistill.methods.curriculum import Curriculum, ScheduledTerm

HALF, THIRD = 1 / 2, 1 / 3
SHARP_NORMAL = [(HALF, HALF, 0)] * 2 + [(THIRD, THIRD, THIRD)] * 3
SHARP_KD_REM = [(HALF, HALF, 0)] * 2 + [(HALF, 0, HALF)] * 3
# k = 1/3, 2/3, 1 in epochs 2, 3, 4.
SMOOTH_NORMAL = [(HALF, HALF, 0)] * 2 + [(4 / 9, 4 / 9, 1 / 9), (7 / 18, 7 / 18, 2 / 9), (THIRD, THIRD, THIRD)]
SMOOTH_KD_REM = [(HALF, HALF, 0)] * 2 + [(HALF, THIRD, 1 / 6), (HALF, 1 / 6, THIRD), (HALF, 0, HALF)]


@pytest.mark.parametrize(
    ("shape", "mode", "expected"),
    [
        ("sharp", "normal", SHARP_NORMAL),
        ("sharp", "kd_rem", SHARP_KD_REM),
        ("smooth", "normal", SMOOTH_NORMAL),
        ("smooth", "kd_rem", SMOOTH_KD_REM),
    ],
)
def test_coefficients_over_five_epochs(shape: str, mode: str, expected: list[tuple[float, float, float]]) -> None:
    curriculum = Curriculum(2, shape, mode, epochs=5)
    for epoch, (task, logits, hidden) in enumerate(expected):
        found = curriculum.at(epoch)
        assert found == pytest.approx({"task": task, "logits": logits, "hidden": hidden})
        assert sum(found.values()) == pytest.approx(1.0)


def test_smooth_from_the_start_and_in_the_last_epoch() -> None:
    assert Curriculum(0, "smooth", "normal", 4).at(0)["hidden"] == pytest.approx(1 / 12)
    assert Curriculum(3, "smooth", "normal", 4).at(3)["hidden"] == pytest.approx(THIRD)


class Constant(nn.Module):
    """A term of the logits that is always 3."""

    name = "logits"

    def needs(self, progress: Progress) -> Needs:
        return Needs(teacher=frozenset({LayerRef("", 1)}), teacher_logits=True)

    def unit(self, name: str) -> str:
        return "example"

    def coefficient(self, name: str, progress: Progress) -> float:
        return 0.5

    def forward(self, student: Signal, teacher: Signal | None, batch: Batch, progress: Progress) -> dict[str, Mean]:
        return {"logits": Mean(torch.tensor(3.0), torch.tensor(1.0))}


def test_a_term_that_does_not_count_asks_for_nothing() -> None:
    term = ScheduledTerm(Constant(), Curriculum(1, "sharp", "kd_rem", 3))
    signal = Signal(None, {}, {})
    before, after = Progress(epoch=0), Progress(epoch=1)
    assert (term.name, term.unit("logits")) == ("logits", "example")
    assert term.coefficient("logits", before) == 0.25
    assert term.needs(before).teacher_logits
    assert term(signal, None, {}, before)["logits"].value == 3.0
    assert term.coefficient("logits", after) == 0.0
    assert not term.needs(after).teacher_at_all
    assert term(signal, None, {}, after) == {}
