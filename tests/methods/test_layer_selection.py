"""Layer selection as released (Yu et al. 2025): the losses of its four tracks, and a start that no map influences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from toy_recipe import toy_recipe
from transformers import AutoModelForSequenceClassification

from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.core.types import LayerRef, Pair, Progress, Signal, StackName
from layerdistill.matching import padded_normalised_mse
from layerdistill.methods.ild import METHOD, IldConfig
from layerdistill.methods.matched import build_maps
from layerdistill.models import block_sources, find_stacks, make_student
from layerdistill.prepare import prepare
from layerdistill.recipe import load_recipe
from layerdistill.runner import load_student_model

WIDTH, BATCH, SEQ = 8, 2, 3
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
T5_COPIES = [0, 6, 11]
QWEN3_COPIES = [0, 4, 9, 13, 18, 22, 27, 31, 35]


def made(layers: int, seed: int, stacks: tuple[StackName, ...] = ("",), mask: Tensor = MASK) -> Signal:
    """States with numbers on padding too, as models have them."""
    draw = torch.Generator().manual_seed(seed)
    hidden = {
        LayerRef(stack, layer): torch.randn(BATCH, SEQ, WIDTH, generator=draw)
        for stack in stacks
        for layer in range(layers + 1)
    }
    return Signal(None, hidden, dict.fromkeys(stacks, mask))


def weighted(student: Signal, teacher: Signal, stacks: tuple[StackName, ...] = ("",), **options: Any) -> float:
    """What the hidden term of a recipe adds to the objective, 3 student blocks and 12 teacher blocks."""
    depths: list[dict[StackName, int]] = [dict.fromkeys(stacks, depth) for depth in (12, 3)]
    width: dict[StackName, int] = dict.fromkeys(stacks, WIDTH)
    pair = Pair(None, nn.Identity(), "sequence-classification", *depths, width, width, None, 0)
    term = next(METHOD.stages(pair, IldConfig(**options))).terms[-1]
    means = term(student, teacher, {}, Progress())
    return sum(term.coefficient(name, Progress()) * mean.value.item() for name, mean in means.items())


def squared(s: Tensor, t: Tensor, text: int, place: int) -> float:
    return sum((a - b) ** 2 for a, b in zip(s[text, place].tolist(), t[text, place].tolist(), strict=True))


def places(padded: bool = False) -> list[tuple[int, int]]:
    return [(text, place) for text in range(BATCH) for place in range(SEQ) if padded or MASK[text, place]]


def state(signal: Signal, layer: int, stack: StackName = "") -> Tensor:
    return signal.hidden[LayerRef(stack, layer)].double()


# The four tracks: 3 times L_hid exactly as coded


@pytest.mark.parametrize("layer_map", ["forward", "reverse", "all_to_one"])
def test_bert_track(layer_map: Any) -> None:
    """3 (1/(N_S+1)) sum_pairs (1/B) sum m |T-S|^2 / sum m, embeddings matched; weight 3 d / B (72 at 768 and 32)."""
    student, teacher = made(3, 1), made(12, 2)
    pairs = {
        "forward": [(0, 0), (1, 4), (2, 8), (3, 12)],
        "reverse": [(0, 0), (1, 12), (2, 8), (3, 4)],
        "all_to_one": [(0, 6), (1, 6), (2, 6), (3, 6)],
    }[layer_map]
    released = 0.0
    for s, t in pairs:
        numerator = sum(squared(state(student, s), state(teacher, t), *at) for at in places())
        released += numerator / BATCH / len(places())
    released *= 3 / (3 + 1)
    ours = weighted(student, teacher, layer_map=layer_map, embeddings=True, weights={"hidden": 3 * WIDTH / BATCH})
    assert ours == pytest.approx(released, rel=1e-5)


def test_bart_track() -> None:
    """3 sum_pairs sum m |T-S|^2 / (d sum m), over encoder and decoder."""
    stacks: tuple[StackName, ...] = ("encoder", "decoder")
    student, teacher = made(3, 1, stacks), made(12, 2, stacks)
    released = 3 * sum(
        squared(state(student, s, stack), state(teacher, t, stack), *at) / (WIDTH * len(places()))
        for stack in stacks
        for s, t in ((0, 0), (1, 4), (2, 8), (3, 12))
        for at in places()
    )
    ours = weighted(student, teacher, stacks, embeddings=True, reduce="sum", weights={"hidden": 3.0})
    assert ours == pytest.approx(released, rel=1e-5)


def standardised(whole: Tensor, at: list[tuple[int, int]]) -> Tensor:
    """(x - mean) / sqrt(var + 1e-5) of all entries at the given places together."""
    entries = [x for text, place in at for x in whole[text, place].tolist()]
    mean = sum(entries) / len(entries)
    variance = sum((x - mean) ** 2 for x in entries) / len(entries)
    return (whole - mean) / math.sqrt(variance + 1e-5)


def test_t5_track() -> None:
    """As BART after one layer_norm of each layer's whole block; mean and variance over real tokens here."""
    student, teacher = made(3, 1), made(12, 2)
    released = 0.0
    for s, t in ((0, 0), (1, 4), (2, 8), (3, 12)):
        sides = [standardised(each, places()) for each in (state(student, s), state(teacher, t))]
        released += 3 * sum(squared(*sides, *at) for at in places()) / (WIDTH * len(places()))
    options = {"embeddings": True, "reduce": "sum", "distance": "layer_norm_mse", "weights": {"hidden": 3.0}}
    assert weighted(student, teacher, **options) == pytest.approx(released, rel=1e-5)
    whole = state(student, 1)
    layer_norm = torch.nn.functional.layer_norm(whole, whole.shape)
    assert torch.allclose(layer_norm, standardised(whole, places(padded=True))), "without padding it is theirs exactly"


@pytest.mark.parametrize("padded", [True, False])
def test_qwen3_track(padded: bool) -> None:
    """3 times the mean over layers, texts and positions of |t/|t| - s/|s||^2, times the share of real positions."""
    mask = MASK if padded else torch.ones_like(MASK)
    student, teacher = made(3, 1, mask=mask), made(12, 2, mask=mask)
    total = 0.0
    for s, t in ((1, 4), (2, 8), (3, 12)):
        for text, place in places(padded=True):
            sides = [state(student, s)[text, place].tolist(), state(teacher, t)[text, place].tolist()]
            norms = [math.sqrt(sum(x * x for x in side)) for side in sides]
            total += sum((a / norms[0] - b / norms[1]) ** 2 for a, b in zip(*sides, strict=True))
    share = mask.sum().item() / mask.numel()
    released = 3 * total / (3 * BATCH * SEQ) * share
    ours = weighted(student, teacher, distance="padded_normalised_mse", weights={"hidden": 3.0})
    assert ours == pytest.approx(released, rel=1e-5)
    clean = weighted(student, teacher, distance="normalised_mse", weights={"hidden": 3.0})
    assert (clean == pytest.approx(released, rel=1e-5)) == (not padded), "equal where nothing is padded"


def test_padded_distance_counts_real_tokens_and_moves_padding() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(BATCH, SEQ, WIDTH, generator=draw, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    mean = padded_normalised_mse(student, teacher, MASK)
    assert mean.count.item() == MASK.sum().item()
    mean.value.backward()
    assert student.grad is not None
    assert student.grad[MASK == 0].any()
    assert torch.autograd.gradcheck(lambda s: padded_normalised_mse(s, teacher, MASK).value, (student,))
    assert padded_normalised_mse(teacher, teacher, 0 * MASK).value.item() == 0


# What the student starts from and what it is matched with are two things


def test_t5_copies_other_blocks_than_it_matches() -> None:
    teacher = tiny_model("t5", num_layers=12, hidden_size=16, num_heads=2)
    student = make_student(teacher, num_blocks=3, copy_map=T5_COPIES)
    for name, stack in find_stacks(student).items():
        theirs = find_stacks(teacher)[name].blocks
        for block, source in zip(stack.blocks, T5_COPIES, strict=True):
            weight = block.layer[-1].DenseReluDense.wi.weight
            assert torch.equal(weight, theirs[source].layer[-1].DenseReluDense.wi.weight)
    depth: list[dict[StackName, int]] = [{"encoder": n, "decoder": n} for n in (12, 3)]
    width: dict[StackName, int] = {"encoder": 16, "decoder": 16}
    pair = Pair(teacher, student, "sequence-classification", *depth, width, width, None, 0)
    for found in build_maps(IldConfig(embeddings=True), pair):
        assert found.pairs == [(0, 0), (1, 4), (2, 8), (3, 12)]


def test_qwen3_copies_other_blocks_than_it_matches() -> None:
    teacher = tiny_model("qwen3", "causal-lm", num_layers=36, hidden_size=8, num_heads=2)
    student = make_student(teacher, num_blocks=9, copy_map=QWEN3_COPIES)
    for block, source in zip(student.model.layers, QWEN3_COPIES, strict=True):
        assert torch.equal(block.mlp.up_proj.weight, teacher.model.layers[source].mlp.up_proj.weight)
    assert block_sources({"": 36}, 9) != {"": tuple(QWEN3_COPIES)}
    pair = Pair(teacher, student, "causal-lm", {"": 36}, {"": 9}, {"": 8}, {"": 8}, 64, 0)
    (found,) = build_maps(IldConfig(), pair)
    assert [target - 1 for _, target in found.pairs] == [3, 7, 11, 15, 19, 23, 27, 31, 35]


STRATEGIES = ("forward", "reverse", "all_to_one", "random", "in_order_random")


@pytest.mark.parametrize("init", ["copy", "random"])
def test_neither_influences_the_other(init: str, tmp_path: Path) -> None:
    """One start for every layer map, and one layer map for every start; only copy_map moves the start of a copy."""
    starts: dict[str, set[str]] = {}
    pairs: dict[str, set[tuple[tuple[int, int], ...]]] = {}
    recipe = toy_recipe(tmp_path, "ild")
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher")
    for copy_map in ("forward", "[0, 3]"):
        for strategy in STRATEGIES:
            changes = [f"student.init={init}", f"student.copy_map={copy_map}", f"method.layer_map={strategy}"]
            recipe["student"] = {"num_blocks": 2}
            prepared = prepare(load_recipe(recipe, changes))
            student = load_student_model(prepared, teacher)
            starts.setdefault(copy_map, set()).add(fingerprint_model(student))
            (found,) = build_maps(prepared.recipe.method, prepared.pair)
            pairs.setdefault(strategy, set()).add(tuple(found.pairs))
    assert all(len(start) == 1 for start in starts.values())
    assert (starts["forward"] == starts["[0, 3]"]) == (init == "random")
    assert all(len(found) == 1 for found in pairs.values())
    assert len(set.union(*pairs.values())) > 2


def test_reverse_matching_with_forward_copies(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "ild")
    recipe["student"] = {"num_blocks": 2}
    recipe["method"]["layer_map"] = "reverse"
    prepared = prepare(load_recipe(recipe))
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher")
    student = load_student_model(prepared, teacher)
    (found,) = build_maps(prepared.recipe.method, prepared.pair)
    assert found.pairs == [(1, 4), (2, 2)]
    copied = [teacher.bert.encoder.layer[source].output.dense.weight for source in (1, 3)]
    ours = [layer.output.dense.weight for layer in student.bert.encoder.layer]
    assert all(torch.equal(*both) for both in zip(ours, copied, strict=True))


# The page that quotes their results


def quoted_rows(text: str, first_cell: str) -> list[list[str]]:
    """The rows of the page's table whose header begins with `first_cell`."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_gains_and_spreads_on_the_page_follow_from_its_tables() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "layer_selection.md").read_text()
    scores: dict[str, dict[str, float]] = {}
    columns = ("MNLI-m", None, "QNLI", "SST-2", "DART", "En-Ro")
    for start, selection, *cells in quoted_rows(text, "start"):
        if start == "teacher":
            continue
        for column, cell in zip(columns, cells, strict=True):
            value = float(cell.split("/")[-1] if column is None else cell.split("/")[0])
            scores.setdefault(f"{start}, {column or 'QQP F1'}", {})[selection] = value
    for selection, *cells in quoted_rows(text, "Qwen3-8B into 9 blocks, copied"):
        for column, cell in zip(("HellaSwag", "CoQA"), cells, strict=True):
            if selection != "teacher":
                scores.setdefault(f"Qwen3, {column}", {})[selection] = float(cell)
    claimed = [tuple(row[at : at + 3]) for row in quoted_rows(text, "setting") for at in (0, 3)]
    assert {setting for setting, _, _ in claimed} == set(scores)
    for setting, gain, spread in claimed:
        matched = [value for selection, value in scores[setting].items() if selection != "none"]
        assert float(gain) == pytest.approx(sum(matched) / len(matched) - scores[setting]["none"], abs=0.0501)
        assert float(spread) == pytest.approx(max(matched) - min(matched), abs=0.0501)
