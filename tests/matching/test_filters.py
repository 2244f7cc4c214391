"""TED's filters and the cross-entropy through a frozen head, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef
from layerdistill.matching import wide_rows
from layerdistill.matching.filters import Filters
from layerdistill.matching.read_out import read_out_cross_entropy

LAYERS = [LayerRef("", 2), LayerRef("", 4)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(filters: Filters) -> list[Tensor]:
    return [filters.maps[name].weight.detach() for name in filters.maps]


def test_a_filter_is_an_affine_map_per_layer() -> None:
    filters = Filters(LAYERS, 5, 3, seed=1)
    hidden = draw(2, 4, 5)
    for layer in LAYERS:
        chosen = filters.maps[str(layer)]
        with torch.no_grad():
            chosen.bias.copy_(draw(3, seed=9))
        found = filters(layer, hidden)
        assert found.shape == (2, 4, 3)
        for text, place, out in ((0, 0, 0), (1, 3, 2)):
            row, line = hidden[text, place].tolist(), chosen.weight[out].tolist()
            expected = sum(a * b for a, b in zip(row, line, strict=True)) + chosen.bias[out].item()
            assert found[text, place, out].item() == pytest.approx(expected, rel=1e-5)


def test_filters_start_as_the_released_ones_do() -> None:
    filters = Filters(LAYERS, 200, 200, seed=1)
    for name in filters.maps:
        chosen = filters.maps[name]
        assert chosen.weight.mean().item() == pytest.approx(0.0, abs=5e-4)
        assert chosen.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not chosen.bias.any()


def test_the_draw_depends_on_seed_layer_and_side_and_on_nothing_else() -> None:
    state = torch.random.get_rng_state()
    first, again = weights(Filters(LAYERS, 4, 4, seed=1)), weights(Filters(LAYERS, 4, 4, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], weights(Filters(LAYERS, 4, 4, seed=2))[0])
    assert not torch.equal(first[0], weights(Filters(LAYERS, 4, 4, seed=1, whose="student"))[0])
    assert torch.equal(first[1], weights(Filters(LAYERS[1:], 4, 4, seed=1))[0])


def test_the_identity_changes_nothing_and_a_nonlinear_filter_has_a_gelu() -> None:
    hidden = draw(2, 4, 5)
    assert torch.equal(Filters(LAYERS, 5, 5, init="identity")(LAYERS[0], hidden), hidden)
    filters = Filters(LAYERS, 5, 3, nonlinear=True)
    inner, _, outer = filters.maps["2"]
    assert (inner.in_features, inner.out_features, outer.out_features) == (5, 5, 3)
    inside = hidden @ inner.weight.T + inner.bias
    inside = inside * (1 + torch.special.erf(inside / math.sqrt(2))) / 2
    torch.testing.assert_close(filters(LAYERS[0], hidden), inside @ outer.weight.T + outer.bias)


def test_low_precision_states_are_filtered_in_float32_without_autocast() -> None:
    filters = Filters(LAYERS, 5, 3)
    hidden = draw(2, 5).bfloat16()
    found = filters(LAYERS[0], hidden)
    assert found.dtype == torch.float32
    assert torch.equal(found, filters(LAYERS[0], hidden.float()))


@pytest.mark.parametrize("nonlinear", [False, True])
def test_under_autocast_filters_hold_large_states_and_only_linear_ones_are_rounded(nonlinear: bool) -> None:
    filters = Filters(LAYERS, 5, 3, nonlinear=nonlinear)
    hidden = 1e6 * draw(2, 5)
    exact = filters(LAYERS[0], hidden)
    for dtype, rounded in ((torch.float16, False), (torch.bfloat16, not nonlinear)):
        with torch.autocast("cpu", dtype=dtype):
            found = filters(LAYERS[0], hidden)
        assert found.dtype == torch.float32
        assert torch.equal(found, exact) != rounded
        torch.testing.assert_close(found, exact, rtol=3e-2, atol=300)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"maps 4 to 5\. Use filter_init: normal"):
        Filters(LAYERS, 4, 5, init="identity")
    with pytest.raises(UserError, match="through a GELU"):
        Filters(LAYERS, 4, 4, init="identity", nonlinear=True)
    with pytest.raises(UserError, match=r"no filter for layer 3; there are filters for: 2, 4"):
        Filters(LAYERS, 4, 4)(LayerRef("", 3), draw(2, 4))


LABELS = torch.tensor([[3, -100, 0], [6, 6, -100]])


def frozen_head(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 7)).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(head.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=number))
    return head.requires_grad_(False)


@pytest.mark.parametrize("piece", [1, 14, 10**6])
def test_cross_entropy_through_a_head_against_the_formula(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(wide_rows.PIECE, "cpu", piece)
    head, rows = frozen_head(), draw(2, 3, 4, seed=5).double().requires_grad_()
    seen: list[int] = []

    def read_out(states: Tensor) -> Tensor:
        seen.append(len(states))
        return head(states)

    mean = read_out_cross_entropy(rows, LABELS, read_out, 7)
    assert sum(seen) == 4, "rows without a label are not read"
    assert max(seen) <= max(piece // 7, 1), "no more logits at once than a piece holds"
    plain = rows.detach().clone().requires_grad_()
    losses = []
    for text, place in ((0, 0), (0, 2), (1, 0), (1, 1)):
        logits = head(plain[text, place])
        losses.append(torch.log(sum(torch.exp(logit) for logit in logits)) - logits[LABELS[text, place]])
    assert mean.total.item() == pytest.approx(sum(losses).item(), rel=1e-12)
    assert mean.count.item() == 4
    (3 * mean.total).backward()
    (3 * sum(losses)).backward()
    torch.testing.assert_close(rows.grad, plain.grad, rtol=1e-10, atol=1e-12)
    assert not rows.grad[LABELS == -100].any()


def test_a_head_in_half_precision_gives_a_float32_loss() -> None:
    rows = draw(2, 3, 4).requires_grad_()
    head = frozen_head(torch.bfloat16)
    mean = read_out_cross_entropy(rows, LABELS, lambda states: head(states.bfloat16()), 7)
    assert mean.total.dtype == torch.float32
    mean.total.backward()
    assert rows.grad.dtype == torch.float32
    assert rows.grad[0, 0].any()


def test_nothing_labelled_is_a_loss_of_zero_and_shapes_are_checked() -> None:
    head, rows = frozen_head(), draw(2, 3, 4).double().requires_grad_()
    mean = read_out_cross_entropy(rows, torch.full((2, 3), -100), head, 7)
    assert (mean.value.item(), mean.count.item()) == (0.0, 0.0)
    mean.total.backward()
    assert not rows.grad.any()
    with pytest.raises(UserError, match=r"labels have shape \(2, 4\) but hidden states \(2, 3, 4\)"):
        read_out_cross_entropy(rows, torch.zeros(2, 4, dtype=torch.long), head, 7)
