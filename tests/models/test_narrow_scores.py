"""The scores of heads and neurons, and what they cost."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from narrow_families import BLOCKS, FAMILIES, HEADS, NEURONS, OUTPUTS, SIZE, WIDTH, blocks, group_size, made
from tiny_models import tiny_batch
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig

from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.models import empty_model
from layerdistill.models.narrow import count_units, lowest, remove_units, score_heads, score_neurons


def heads_of(block: nn.Module, family: str) -> list[list[Tensor]]:
    """Each head's (or group's) own weights, written down family by family."""
    state = {name: value.double() for name, value in block.state_dict().items()}
    pick = partial(slices, state, size=SIZE * group_size(family))
    out = OUTPUTS[family][0]
    if family == "gpt2":
        fused = state["attn.c_attn.weight"].T
        thirds = [fused[start : start + WIDTH] for start in (0, WIDTH, 2 * WIDTH)]
        return [
            [*(third[head * SIZE : head * SIZE + SIZE] for third in thirds), pick(f"{out}.weight", head)]
            for head in range(8)
        ]
    if family == "modernbert":
        fused = state["attn.Wqkv.weight"].view(3, 8, SIZE, WIDTH)
        return [[fused[:, head], pick(f"{out}.weight", head, columns=True)] for head in range(8)]
    if family == "gpt-neox":
        fused = state["attention.query_key_value.weight"].view(8, 3, SIZE, WIDTH)
        return [[fused[head], pick(f"{out}.weight", head, columns=True)] for head in range(8)]
    bert_like = {
        "bert": "query key value",
        "roberta": "query key value",
        "deberta-v2": "query_proj key_proj value_proj",
    }
    names = bert_like.get(family, "q_proj k_proj v_proj").split()
    inside = "attention.self" if family in bert_like else "self_attn"
    query, key, value = (f"{inside}.{name}.weight" for name in names)
    return [
        [
            pick(query, head),
            slices(state, key, head, SIZE),
            slices(state, value, head, SIZE),
            pick(f"{out}.weight", head, columns=True),
        ]
        for head in range(8 // group_size(family))
    ]


def slices(state: dict[str, Tensor], name: str, head: int, size: int, columns: bool = False) -> Tensor:
    weight = state[name].T if columns else state[name]
    return weight[head * size : (head + 1) * size]


def neurons_of(block: nn.Module, family: str) -> list[list[Tensor]]:
    """Each neuron's own weights, into it and out of it."""
    state = {name: value.double() for name, value in block.state_dict().items()}
    outward = state[OUTPUTS[family][1] + ".weight"]
    outward = outward if family == "gpt2" else outward.T
    into = {
        "modernbert": lambda: state["mlp.Wi.weight"].view(2, -1, WIDTH).transpose(0, 1),
        "gpt2": lambda: state["mlp.c_fc.weight"].T,
        "opt": lambda: state["fc1.weight"],
        "phi": lambda: state["mlp.fc1.weight"],
        "gpt-neox": lambda: state["mlp.dense_h_to_4h.weight"],
        "llama": lambda: torch.stack([state["mlp.gate_proj.weight"], state["mlp.up_proj.weight"]], dim=1),
    }
    into["qwen3"] = into["llama"]
    inward = into.get(family, lambda: state["intermediate.dense.weight"])()
    return [[inward[neuron], outward[neuron]] for neuron in range(len(outward))]


def slow_sum(weights: list[Tensor]) -> float:
    return sum(abs(value) for weight in weights for value in weight.flatten().tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_sums_of_absolute_weights(family: str) -> None:
    model = made(family).float()
    for block, heads, neurons in zip(blocks(model, family), score_heads(model), score_neurons(model), strict=True):
        assert heads.tolist() == pytest.approx([slow_sum(weights) for weights in heads_of(block, family)], rel=1e-12)
        assert neurons.tolist() == pytest.approx([slow_sum(own) for own in neurons_of(block, family)], rel=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_planted_zeros_are_the_lowest(family: str) -> None:
    model = made(family)
    for block, heads, neurons in zip(blocks(model, family), HEADS, NEURONS, strict=True):
        attention, feed_forward = (block.get_submodule(name) for name in OUTPUTS[family])
        size = SIZE * group_size(family)
        for head in heads:
            (attention.weight if family == "gpt2" else attention.weight.T)[head * size : (head + 1) * size] = 0
        (feed_forward.weight if family == "gpt2" else feed_forward.weight.T)[neurons] *= 1e-3
        inward = {"modernbert": "mlp.Wi", "gpt2": "mlp.c_fc", "opt": "fc1", "phi": "mlp.fc1"}
        inward |= {"gpt-neox": "mlp.dense_h_to_4h", "llama": "mlp.up_proj", "qwen3": "mlp.up_proj"}
        weight = block.get_submodule(inward.get(family, "intermediate.dense")).weight
        (weight.T if family == "gpt2" else weight)[neurons] = 0
    heads_found = [lowest(score, 1) for score in score_heads(model)]
    assert heads_found == HEADS
    batch = tiny_batch(model)
    before = model(**batch).logits
    assert [set(lowest(score, 3)) for score in score_neurons(model)] == [set(given) for given in NEURONS]
    fingerprint = fingerprint_model(model)
    score_heads(model)
    assert fingerprint_model(model) == fingerprint, "scoring changes nothing"
    remove_units(model, heads_found, [[]] * BLOCKS)
    torch.testing.assert_close(model(**batch).logits, before, atol=1e-12, rtol=1e-12)


def test_of_equal_scores_the_first_go() -> None:
    assert lowest(torch.tensor([2.0, 1.0, 1.0, 0.5, 1.0]), 3) == [1, 2, 3]
    assert lowest(torch.ones(4), 0) == []


def test_units_of_gpt2() -> None:
    units = count_units(empty_model(GPT2Config(), "causal-lm"))
    assert (units.blocks, units.heads, units.neurons, units.parameters) == (12, 12, 3072, 124_439_808)
    assert units.parameters_per_head == 12 * (4 * 768 * 64 + 3 * 64)
    assert units.parameters_per_neuron == 12 * (2 * 768 + 1)


def test_units_of_grouped_heads() -> None:
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, intermediate_size=96
    )
    units = count_units(empty_model(config, "causal-lm"))
    assert (units.heads, units.queries_per_head, units.neurons) == (2, 4, 96)
    assert units.parameters_per_head == 2 * (2 * 4 + 2) * 8 * 64, "four heads of queries with one of keys and values"
    assert units.parameters_per_neuron == 2 * 3 * 64
