"""Projections: shapes, what is trained, seeds, what stays fixed, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef
from layerdistill.matching import Projections

LAYERS = (LayerRef("encoder", 1), LayerRef("encoder", 3), LayerRef("encoder", -1))


@pytest.mark.parametrize("kind", ["linear", "frozen_random", "orthogonal"])
@pytest.mark.parametrize("widths", [(6, 10), (10, 6), (8, 8)])
@pytest.mark.parametrize("shared", [False, True])
def test_every_kind_is_a_linear_map_to_the_teachers_width(kind: Any, widths: tuple[int, int], shared: bool) -> None:
    projections = Projections(kind, LAYERS, *widths, shared=shared)
    hidden = torch.randn(2, 5, widths[0], generator=torch.Generator().manual_seed(0))
    outputs = [projections(layer, hidden) for layer in LAYERS]
    assert all(output.shape == (2, 5, widths[1]) for output in outputs)
    assert torch.allclose(projections(LAYERS[0], 3 * hidden), 3 * outputs[0], atol=1e-5)
    assert torch.equal(outputs[0], outputs[1]) == shared
    maps = 1 if shared else len(LAYERS)
    assert projections.num_parameters == (0 if kind == "frozen_random" else maps * widths[0] * widths[1])


def test_identity_gives_its_input_back_and_has_nothing_to_train() -> None:
    projections = Projections("identity", LAYERS, 4, 4)
    hidden = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    assert projections(LAYERS[1], hidden) is hidden
    assert projections.num_parameters == 0


def test_frozen_random_has_the_variance_it_says_and_never_changes() -> None:
    projections = Projections("frozen_random", LAYERS, 256, 512)
    weights = [buffer for name, buffer in projections.named_buffers() if name.endswith("weight")]
    assert len(weights) == 3
    for weight in weights:
        assert weight.mean().item() == pytest.approx(0, abs=1e-3)
        assert weight.var().item() * 256 == pytest.approx(1, rel=0.03)
    hidden = torch.randn(2, 256, requires_grad=True)
    projections(LAYERS[0], hidden).sum().backward()
    assert hidden.grad is not None
    assert all(weight.grad is None for weight in weights)
    assert set(projections.state_dict()) == {f"maps.encoder_{name}.weight" for name in ("1", "3", "final")}


@pytest.mark.parametrize("widths", [(6, 10), (10, 6), (8, 8)])
def test_orthogonal_stays_semi_orthogonal_while_it_is_trained(widths: tuple[int, int]) -> None:
    projections = Projections("orthogonal", LAYERS[:1], *widths)
    optimiser = torch.optim.SGD(projections.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(0)
    hidden, target = torch.randn(20, widths[0], generator=generator), torch.randn(20, widths[1], generator=generator)
    before = projections(LAYERS[0], torch.eye(widths[0])).T.detach()
    for _ in range(5):
        optimiser.zero_grad()
        (projections(LAYERS[0], hidden) - target).square().mean().backward()
        optimiser.step()
    after = projections(LAYERS[0], torch.eye(widths[0])).T.detach()
    assert (after - before).abs().max() > 1e-2
    for weight in (before, after):
        small = weight.T @ weight if widths[0] <= widths[1] else weight @ weight.T
        assert torch.allclose(small, torch.eye(min(widths)), atol=1e-5)


def test_linear_and_frozen_random_start_from_the_same_draw_and_seeds_differ() -> None:
    eye = torch.eye(5)
    linear, frozen = (Projections(kind, LAYERS, 5, 7, seed=3) for kind in ("linear", "frozen_random"))
    assert torch.equal(linear(LAYERS[0], eye), frozen(LAYERS[0], eye))
    assert not torch.equal(linear(LAYERS[0], eye), Projections("linear", LAYERS, 5, 7, seed=4)(LAYERS[0], eye))
    alone = Projections("linear", LAYERS[1:2], 5, 7, seed=3)
    assert torch.equal(alone(LAYERS[1], eye), linear(LAYERS[1], eye))


def test_making_projections_does_not_disturb_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for kind in ("linear", "frozen_random", "orthogonal"):
        Projections(kind, LAYERS, 5, 7)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_states_are_projected_in_float32_without_autocast(autocast: bool) -> None:
    projections = Projections("linear", LAYERS, 4, 6, bias=True)
    hidden = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = projections(LAYERS[0], hidden)
    assert output.dtype == torch.float32
    output.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    grads = dict(projections.named_parameters())
    assert grads["maps.encoder_1.weight"].grad is not None
    assert grads["maps.encoder_1.bias"].tolist() == [0.0] * 6


def test_an_orthogonal_weight_is_computed_in_float32_under_autocast() -> None:
    projections = Projections("orthogonal", LAYERS, 48, 64)
    hidden = torch.eye(48)
    plain = projections(LAYERS[0], hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = projections(LAYERS[0], hidden)
    assert torch.equal(rounded, plain.bfloat16()), "only the weight's entries are rounded, once"
    torch.testing.assert_close(plain @ plain.T, torch.eye(48), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "widths", "bias", "message"),
    [
        ("identity", (4, 6), False, "4 wide and the teacher's 6: use projection 'linear'"),
        ("lineal", (4, 6), False, "projection is 'lineal'.*Did you mean 'linear'"),
        ("frozen_random", (4, 6), True, "has no bias"),
        ("identity", (4, 4), True, "has no bias"),
    ],
)
def test_what_cannot_be_is_refused(kind: Any, widths: tuple[int, int], bias: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Projections(kind, LAYERS, *widths, bias=bias)


@pytest.mark.parametrize("kind", ["identity", "linear"])
def test_a_layer_without_projection_is_named(kind: Any) -> None:
    with pytest.raises(UserError, match=r"layer encoder\.2; there are projections for: encoder\.1, encoder\.3"):
        Projections(kind, LAYERS, 4, 4)(LayerRef("encoder", 2), torch.ones(1, 4))
