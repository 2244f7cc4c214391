"""Layer references, means and needs: the words that stations hand to each other."""

from __future__ import annotations

import pytest
import torch

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef, Mean, Needs


@pytest.mark.parametrize(
    ("given", "stack", "number"),
    [
        (3, "", 3),
        ("3", "", 3),
        (0, "", 0),
        ("final", "", -1),
        ("encoder.3", "encoder", 3),
        ("decoder.12", "decoder", 12),
        ("decoder.final", "decoder", -1),
    ],
)
def test_layers_are_read_and_written_alike(given: int | str, stack: str, number: int) -> None:
    layer = LayerRef.parse(given)
    assert (layer.stack, layer.number) == (stack, number)
    assert str(layer) == str(given)
    assert LayerRef.parse(str(layer)) == layer
    assert LayerRef.parse(layer) is layer


@pytest.mark.parametrize(
    "given", ["", "-1", -1, "3.5", 3.0, "top", "encoder", "encoder.", "encodr.3", "encoder.decoder.3", "h.3", True, "²"]
)
def test_what_is_no_layer_is_refused(given: object) -> None:
    with pytest.raises(UserError, match="cannot be read: write a number from 0") as caught:
        LayerRef.parse(given)  # type: ignore[arg-type]
    assert repr(given) in str(caught.value)


def test_layers_are_keys() -> None:
    assert {LayerRef("", 3): 1}[LayerRef.parse("3")] == 1
    assert LayerRef("encoder", 3) != LayerRef("decoder", 3)


def test_means_add_as_sums_and_counts() -> None:
    parts = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([11.0])]
    whole = Mean(torch.tensor(0.0), torch.tensor(0.0))
    for part in parts:
        whole = whole + Mean(part.sum(), torch.tensor(float(len(part))))
    assert whole.value.item() == torch.cat(parts).mean().item() == 5.0
    assert torch.stack([part.mean() for part in parts]).mean().item() != 5.0, "averages of averages are another thing"


def test_a_mean_of_nothing_is_zero_with_a_gradient_of_zero() -> None:
    values = torch.ones(3, requires_grad=True)
    nothing = Mean((values * torch.zeros(3)).sum(), torch.tensor(0.0))
    nothing.value.backward()
    assert nothing.value.item() == 0.0
    assert torch.equal(values.grad, torch.zeros(3))


def test_needs_are_united() -> None:
    first = Needs(student=frozenset({LayerRef("", 1)}))
    second = Needs(teacher=frozenset({LayerRef("", 4)}), student=frozenset({LayerRef("", 2)}))
    both = first | second | Needs(teacher_logits=True)
    assert both.student == {LayerRef("", 1), LayerRef("", 2)}
    assert both.teacher == {LayerRef("", 4)}
    assert both.teacher_logits
    assert not first.teacher_at_all, "student layers alone do not run the teacher"
    assert second.teacher_at_all
    assert Needs(teacher_logits=True).teacher_at_all
