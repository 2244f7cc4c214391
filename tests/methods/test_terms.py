"""The terms against their formulas: which rows and layers they look at, what they ask for, what they count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from term_references import MASK, cka, draw, pair_of, real, signal, softened_kl, squared_error, states, times
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef, Progress
from layerdistill.matching import Projections, layer_map, masked_mse
from layerdistill.methods import matched
from layerdistill.methods.hidden_term import HiddenTerm
from layerdistill.methods.logits_term import LogitsTerm, default_logits_loss, logits_loss_problem
from layerdistill.methods.preview import describe_term
from layerdistill.methods.table import METHODS
from layerdistill.methods.task_term import TaskTerm

START = Progress()
TASKS = ("sequence-classification", "multi-label-classification", "regression", "causal-lm")


def refs(*numbers: int) -> frozenset[LayerRef]:
    return frozenset(LayerRef("", number) for number in numbers)


def hidden_term(method: str = "ild", widths: tuple[int, int] = (4, 6), seed: int = 0, **options: Any) -> HiddenTerm:
    """The hidden term as a method makes it."""
    config = METHODS[method].Config(name=method, **options)
    stages = list(METHODS[method].stages(pair_of(widths=widths, seed=seed), config, None))
    assert [stage.name for stage in stages] == ["distill"]
    term = stages[0].terms[-1]
    assert isinstance(term, HiddenTerm)
    return term


# Logits


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_logits_of_classes_against_the_formula(temperature: float) -> None:
    ours, theirs = draw(3, 5, seed=1), draw(3, 5, seed=2)
    term = LogitsTerm("sequence-classification", 0.7, None, temperature)
    means = term(signal(logits=ours), signal(logits=theirs), {"labels": torch.tensor([0, 1, 2])}, START)
    assert set(means) == {"logits"}
    expected = softened_kl(ours.double().tolist(), theirs.double().tolist(), temperature)
    assert means["logits"].value.item() == pytest.approx(expected, rel=1e-5)
    assert means["logits"].count.item() == 3
    assert (term.unit("logits"), term.coefficient("logits", START)) == ("example", 0.7)


LABELS = torch.tensor([[9, -100, 3, 4, 5], [1, 2, 3, -100, -100], [-100, -100, 3, -100, -100]])
PREDICTED = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 1)]
"""(text, position) whose next token has a label."""


@pytest.mark.parametrize("vocab_size", [None, 7])
@pytest.mark.parametrize("loss", ["forward_kl", "mse"])
def test_logits_of_tokens_where_the_next_one_has_a_label(loss: Any, vocab_size: int | None) -> None:
    ours, theirs = draw(3, 5, 9, seed=1), draw(3, 5, 12, seed=2)
    kept = vocab_size or 9
    for tensor in (ours, theirs):
        unseen = torch.ones(3, 5, dtype=torch.bool)
        for place in PREDICTED:
            unseen[place] = False
        tensor[unseen] = float("nan")
        tensor[..., kept:] = 1e4
    ours.requires_grad_()
    term = LogitsTerm("causal-lm", 1.0, loss, 2.0, vocab_size)
    mean = term(signal(logits=ours), signal(logits=theirs), {"labels": LABELS}, START)["logits"]
    rows = [
        [side[text, place].detach().double().tolist()[:kept] for text, place in PREDICTED] for side in (ours, theirs)
    ]
    expected = softened_kl(*rows, 2.0) if loss == "forward_kl" else squared_error(*rows)
    assert mean.value.item() == pytest.approx(expected, rel=1e-5)
    assert mean.count.item() == len(PREDICTED)
    assert term.unit("logits") == "label"
    mean.total.backward()
    gradient = ours.grad
    touched = {tuple(place) for place in gradient.abs().sum(-1).nonzero().tolist()}
    assert touched == set(PREDICTED), "what is not predicted gets a gradient of exactly 0"
    assert not gradient[..., kept:].any(), "rows that are no token get no probability and no gradient"


def test_the_loss_fits_the_task() -> None:
    assert [default_logits_loss(task) for task in TASKS] == ["forward_kl", "binary_kl", "mse", "forward_kl"]
    allowed = {
        task: {loss for loss in ("forward_kl", "reverse_kl", "js_divergence", "soft_cross_entropy", "binary_kl", "mse")
               if logits_loss_problem(loss, task) is None}  # type: ignore[arg-type]
        for task in TASKS
    }  # fmt: skip
    categorical = {"forward_kl", "reverse_kl", "js_divergence", "soft_cross_entropy", "mse"}
    assert allowed == {
        "sequence-classification": categorical,
        "causal-lm": categorical,
        "regression": {"mse"},
        "multi-label-classification": {"binary_kl", "mse"},
    }


@pytest.mark.parametrize("method", ["kd", "ild", "cka"])
def test_a_kl_over_one_regression_output_is_refused(method: str) -> None:
    config = METHODS[method].Config(name=method, logits_loss="forward_kl")
    problems = METHODS[method].problems(config, pair_of("regression"))
    assert len(problems) == 1
    assert "'forward_kl', which does not fit the task 'regression'" in problems[0]
    assert "silently 0" in problems[0]
    with pytest.raises(UserError, match="silently 0"):
        LogitsTerm("regression", 1.0, "forward_kl", 2.0)


def test_regression_is_compared_by_squared_error() -> None:
    ours, theirs = draw(3, 1, seed=1), draw(3, 1, seed=2)
    mean = LogitsTerm("regression", 1.0, None, 2.0)(signal(logits=ours), signal(logits=theirs), {}, START)["logits"]
    assert mean.value.item() == pytest.approx(squared_error(ours.tolist(), theirs.tolist()), rel=1e-5)


# Hidden states


def test_projected_states_against_the_formula() -> None:
    term = hidden_term()
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    weights = {}
    for number in (1, 2):
        weights[number] = draw(6, 4, seed=number)
        with torch.no_grad():
            term.projections["only"].maps[str(number)].weight.copy_(weights[number])
    means = term(signal(ours), signal(theirs), {}, START)
    assert set(means) == {"hidden/1-2", "hidden/2-4"}
    for student, teacher in ((1, 2), (2, 4)):
        projected = times(real(ours[LayerRef("", student)]), weights[student].double().tolist())
        expected = squared_error(projected, real(theirs[LayerRef("", teacher)]))
        mean = means[f"hidden/{student}-{teacher}"]
        assert mean.value.item() == pytest.approx(expected, rel=1e-5)
        assert mean.count.item() == MASK.sum()
    assert term.unit("hidden/1-2") == "token"


@pytest.mark.parametrize("form", ["cka", "sqrt"])
def test_alignment_against_the_formula(form: str) -> None:
    term = hidden_term("cka", form=form)
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    means = term(signal(ours), signal(theirs), {}, START)
    for student, teacher in ((1, 2), (2, 4)):
        found = cka(real(ours[LayerRef("", student)]), real(theirs[LayerRef("", teacher)]))
        mean = means[f"hidden/{student}-{teacher}"]
        assert mean.value.item() == pytest.approx(1 - (found if form == "cka" else found**0.5), rel=1e-5)
        assert mean.count.item() == 1
    assert term.unit("hidden/1-2") == "batch", "one number per batch, whatever its tokens"


def test_debiased_alignment_keeps_its_precision_under_autocast() -> None:
    term = hidden_term("cka", debiased=True)
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    plain = term(signal(ours), signal(theirs), {}, START)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = term(signal(ours), signal(theirs), {}, START)
    assert {name: mean.value.item() for name, mean in rounded.items()} == {
        name: mean.value.item() for name, mean in plain.items()
    }


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ild", {}),
        ("ild", {"projection_bias": True, "distance": "relative_mse"}),
        ("ild", {"distance": "cosine"}),
        ("ild", {"projection": "frozen_random"}),
        ("cka", {}),
        ("cka", {"form": "sqrt"}),
        ("ted", {"filters": "none", "finetune_student_first": False}),
    ],
    ids=str,
)
def test_products_in_bfloat16_are_near_those_in_float32(method: str, options: dict[str, Any]) -> None:
    found, gradients = [], []
    for dtype in (None, "bfloat16"):
        term = hidden_term(method, **options, hidden_dtype=dtype)
        ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
        for state in ours.values():
            state.requires_grad_()
        means = term(signal(ours), signal(theirs), {}, START)
        assert not torch.is_autocast_enabled("cpu")
        torch.stack([mean.value for mean in means.values()]).sum().backward()
        found.append(torch.stack([mean.value for mean in means.values()]))
        gradients.append([ours[LayerRef("", number)].grad for number in (1, 2)])
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=1e-3)
    assert not torch.equal(found[1], found[0]), "something must have been rounded"
    for exact, rounded in zip(*gradients, strict=True):
        assert (rounded - exact)[MASK == 1].norm() < 0.03 * exact[MASK == 1].norm()
        assert not rounded[MASK == 0].any()


@pytest.mark.parametrize("native", ["bfloat16", "float32"])
def test_fast_is_bfloat16_where_it_is_native(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matched, "fast_dtype", lambda: native)
    term = hidden_term(hidden_dtype="fast")
    assert term.dtype == (torch.bfloat16 if native == "bfloat16" else None)
    assert describe_term(term) == f"0.5 × hidden per pair{' (products in bfloat16)' * (native == 'bfloat16')}"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ild", {}),
        ("ild", {"layer_map": "average"}),
        ("cka", {}),
        ("ted", {"filters": "none", "finetune_student_first": False}),
    ],
    ids=str,
)
def test_a_teachers_rows_stand_for_its_states(method: str, options: dict[str, Any]) -> None:
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    asked = hidden_term(method, **options)(signal(ours), signal(theirs), {}, START)
    rows = {layer: state[MASK == 1] for layer, state in theirs.items()}
    found = hidden_term(method, **options)(signal(ours), replace(signal({}), rows=rows), {}, START)
    assert {name: mean.value.item() for name, mean in found.items()} == {
        name: mean.value.item() for name, mean in asked.items()
    }


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ild", {"distance": "padded_normalised_mse"}),
        ("ted", {"filters": "none", "finetune_student_first": False, "mask_padding": False}),
    ],
    ids=str,
)
def test_where_padding_counts_a_teachers_rows_are_not_taken(method: str, options: dict[str, Any]) -> None:
    ours, theirs = (
        {layer: state.nan_to_num(0.5) for layer, state in states(*of).items()} for of in ((4, 2, 1), (6, 4, 2))
    )
    asked = hidden_term(method, **options)(signal(ours), signal(theirs), {}, START)
    rows = {layer: state[MASK == 1] for layer, state in theirs.items()}
    found = hidden_term(method, **options)(signal(ours), replace(signal(theirs), rows=rows), {}, START)
    assert {name: mean.value.item() for name, mean in found.items()} == {
        name: mean.value.item() for name, mean in asked.items()
    }


def test_an_average_map_compares_with_the_mean_of_its_group() -> None:
    term = hidden_term(widths=(6, 6), layer_map="average", projection="identity")
    ours, theirs = states(6, 2, seed=1), states(6, 4, seed=2)
    means = term(signal(ours), signal(theirs), {}, START)
    assert set(means) == {"hidden/1-1..2", "hidden/2-3..4"}
    for student, group in ((1, (1, 2)), (2, (3, 4))):
        both = [real(theirs[LayerRef("", number)]) for number in group]
        mean = [[(a + b) / 2 for a, b in zip(x, y, strict=True)] for x, y in zip(*both, strict=True)]
        expected = squared_error(real(ours[LayerRef("", student)]), mean)
        assert means[f"hidden/{student}-{group[0]}..{group[1]}"].value.item() == pytest.approx(expected, rel=1e-5)
    assert term.needs(START).teacher == refs(1, 2, 3, 4)


@pytest.mark.parametrize("method", ["ild", "cka"])
def test_a_teacher_layer_that_pairs_share_is_prepared_once(method: str) -> None:
    term = hidden_term(method, layer_map="all_to_one")
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    prepare, seen = term.prepare or (lambda rows: rows), []
    term.prepare = lambda rows: (seen.append(rows.shape), prepare(rows))[1]
    shared = term(signal(ours), signal(theirs), {}, START)
    assert len(shared) == 2
    assert seen == [(int(MASK.sum()), 6)]
    for layer, targets in term.groups(START):
        alone = hidden_term(method, layer_map=[[layer.number, targets[0].number]])
        (name, mean), *rest = alone(signal(ours), signal(theirs), {}, START).items()
        assert not rest
        assert mean.value.item() == shared[name].value.item()


def test_half_precision_states_are_averaged_in_float32() -> None:
    theirs = {layer: torch.full((3, 5, 6), 256.0 + layer.number).bfloat16() for layer in states(6, 4, 0)}
    ours = {layer: torch.zeros(3, 5, 6) for layer in states(6, 2, 0)}
    term = hidden_term(widths=(6, 6), layer_map="average", projection="identity")
    found = term(signal(ours), signal(theirs), {}, START)["hidden/1-1..2"].value.item()
    exact = [theirs[LayerRef("", number)].float()[0, 0, 0].item() for number in (1, 2)]
    assert found == pytest.approx((sum(exact) / 2) ** 2, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "pairs", "mean", "total"),
    [
        ({"layer_map": "forward"}, 2, 0.25, 0.5),
        ({"layer_map": "forward", "embeddings": True}, 3, 0.5 / 3, 0.5),
        ({"layer_map": [[2, 4]]}, 1, 0.5, 0.5),
        ({"layer_map": "average"}, 2, 0.25, 0.5),
    ],
)
def test_the_weight_is_shared_or_given_to_every_pair(
    options: dict[str, Any], pairs: int, mean: float, total: float
) -> None:
    for reduce, expected in (("mean", mean), ("sum", total)):
        term = hidden_term("cka", weights={"hidden": 0.5}, reduce=reduce, **options)
        assert len(term.groups(START)) == pairs
        assert term.coefficient("hidden/1-2", START) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["ild", "cka"])
@pytest.mark.parametrize(
    ("options", "student", "teacher"),
    [
        ({}, (1, 2), (2, 4)),
        ({"layer_map": "reverse"}, (1, 2), (4, 2)),
        ({"layer_map": "all_to_one"}, (1, 2), (2,)),
        ({"layer_map": "last", "embeddings": True}, (0, 1, 2), (0, 3, 4)),
        ({"layer_map": [[2, 3], ["final", "final"], [2, 1]]}, (2, -1), (3, -1, 1)),
    ],
)
def test_exactly_the_matched_layers_are_asked_for(
    method: str, options: dict[str, Any], student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    needs = hidden_term(method, **options).needs(START)
    assert needs.student == refs(*student)
    assert needs.teacher == refs(*teacher)
    assert not needs.teacher_logits


def test_other_terms_ask_for_no_layers() -> None:
    assert not TaskTerm("sequence-classification", 1.0).needs(START).teacher_at_all
    logits = LogitsTerm("sequence-classification", 1.0, None, 2.0).needs(START)
    assert logits.teacher_logits
    assert logits.student == logits.teacher == frozenset()


@pytest.mark.parametrize("strategy", ["random", "in_order_random"])
@pytest.mark.parametrize(("redraw", "moves"), [("run", None), ("epoch", "epoch"), ("batch", "step")])
def test_random_maps_are_drawn_anew_as_often_as_asked(strategy: str, redraw: str, moves: str | None) -> None:
    # Eight teacher blocks, so that two draws are rarely the same.
    maps = [layer_map(strategy, 3, 8, seed=seed, redraw=redraw) for seed in (0, 0, 1)]  # type: ignore[arg-type]
    terms = [HiddenTerm([each], masked_mse, 1.0) for each in maps]

    def seen(term: HiddenTerm, what: str) -> list[frozenset[LayerRef] | tuple[Any, ...]]:
        return [tuple(term.groups(Progress(**{what: number}))) for number in range(8)]

    for what in ("epoch", "step"):
        found = seen(terms[0], what)
        assert found == seen(terms[1], what), "the same on every process and after a resume"
        assert (len(set(found)) > 3) == (what == moves)
        assert (len(set(found)) == 1) == (what != moves)
    if moves:
        assert seen(terms[2], moves) != seen(terms[0], moves), "another seed draws other maps"
    for number in range(8):
        progress = Progress(epoch=number, step=number)
        needs = terms[0].needs(progress)
        assert needs.student == refs(1, 2, 3)
        assert needs.teacher == {layer for _, group in terms[0].groups(progress) for layer in group}
        assert needs.teacher <= refs(*range(1, 9))


def test_a_redrawn_pair_keeps_the_students_projection() -> None:
    term = hidden_term(layer_map="random", redraw="batch")
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    names = set()
    for step in range(6):
        means = term(signal(ours), signal(theirs), {}, Progress(step=step))
        names |= set(means)
        weights = {name: module.weight for name, module in term.projections["only"].maps.items()}
        assert set(weights) == {"1", "2"}
        for name, mean in means.items():
            student, teacher = name.removeprefix("hidden/").split("-")
            projected = times(real(ours[LayerRef.parse(student)]), weights[student].double().tolist())
            expected = squared_error(projected, real(theirs[LayerRef.parse(teacher)]))
            assert mean.value.item() == pytest.approx(expected, rel=1e-5)
    assert len(names) > 2, "the map has changed on the way"


def test_gradients_reach_the_student_and_the_projection_and_not_the_teacher() -> None:
    term = hidden_term()
    ours, theirs = states(4, 2, seed=1), states(6, 4, seed=2)
    for tensor in (*ours.values(), *theirs.values()):
        tensor.requires_grad_()
    totals: list[Tensor] = [mean.total for mean in term(signal(ours), signal(theirs), {}, START).values()]
    torch.stack(totals).sum().backward()
    for number in (1, 2):
        gradient = ours[LayerRef("", number)].grad
        assert gradient is not None
        assert torch.equal(gradient.abs().sum(-1) > 0, MASK.bool()), "padding gets a gradient of exactly 0"
    assert all(tensor.grad is None for tensor in theirs.values())
    assert all(parameter.grad.abs().sum() > 0 for parameter in term.parameters())


def test_stacks_of_an_encoder_decoder_are_named_and_counted_apart() -> None:
    maps = [layer_map("forward", 1, 2, stack=stack) for stack in ("encoder", "decoder")]
    projections = {each.stack: Projections("linear", [each.refs_at(0, 0)[0][0]], 4, 6) for each in maps}
    term = HiddenTerm(maps, masked_mse, 1.0, projections)
    assert term.unit("hidden/encoder.1-2") == "token"
    assert term.unit("hidden/decoder.1-2") == "decoder_token"
    assert {str(layer) for layer in term.needs(START).student} == {"encoder.1", "decoder.1"}
    names = {name.split(".")[1] for name, _ in term.named_parameters()}
    assert names == {"encoder", "decoder"}
