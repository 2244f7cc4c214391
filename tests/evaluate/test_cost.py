"""Cost against counts worked out by hand, and a clock that takes turns."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from evaluate_cases import VOCAB, bert, gpt2, t5
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import BartConfig, BartForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from layerdistill.core.errors import UserError
from layerdistill.evaluate.config import EvaluationConfig
from layerdistill.evaluate.cost import count_macs, count_parameters, measure_cost, measure_costs, random_inputs
from layerdistill.evaluate.inference import inference
from layerdistill.evaluate.latency import MAX_ROUNDS, WARM_UP_ROUNDS, interleaved_latency
from layerdistill.evaluate.memory import LiveBytes, peak_allocation

CPU = torch.device("cpu")
H, I, SEQ = 32, 64, 16  # noqa: E741
BLOCK_KINDS = ("eager", "sdpa")
SINGLE = EvaluationConfig(latency_batch_sizes=(1,), latency=False)


def with_attention(model, kind: str):
    model.set_attn_implementation(kind)
    return model


def attention_macs(queries: int, keys: int, width: int) -> int:
    """Scores q k^T and the weighted sum of v, over all heads."""
    return 2 * queries * keys * width


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_macs_of_bert(kind: str) -> None:
    model = with_attention(bert(num_labels=3), kind)
    block = SEQ * (4 * H * H + 2 * H * I) + attention_macs(SEQ, SEQ, H)
    expected = 2 * block + H * H + H * 3  # the pooler and the classifier read one position
    assert count_macs(model, random_inputs(model, 1, SEQ, CPU)) == expected
    assert count_macs(model, random_inputs(model, 5, SEQ, CPU)) == 5 * expected


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_macs_of_gpt2(kind: str) -> None:
    model = with_attention(gpt2(), kind)
    block = SEQ * (4 * H * H + 2 * H * 4 * H) + attention_macs(SEQ, SEQ, H)
    assert count_macs(model, random_inputs(model, 1, SEQ, CPU)) == 2 * block + SEQ * H * VOCAB


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_macs_of_t5(kind: str) -> None:
    model = with_attention(t5(), kind)
    encoder = SEQ * (4 * H * H + 2 * H * I) + attention_macs(SEQ, SEQ, H)
    decoder = SEQ * (8 * H * H + 2 * H * I) + 2 * attention_macs(SEQ, SEQ, H)
    expected = encoder + decoder + SEQ * H * VOCAB
    assert count_macs(model, random_inputs(model, 1, SEQ, CPU)) == expected
    assert measure_cost(model, SEQ, SINGLE)["macs_per_token"] == expected / (2 * SEQ)


def test_parameters_of_bert_and_of_a_tied_gpt2() -> None:
    embedding = (VOCAB + 64 + 2) * H
    block = 4 * (H * H + H) + (H * I + I) + (I * H + H) + 4 * H
    counted = count_parameters(bert(num_labels=3))
    assert counted["embedding"] == embedding
    assert counted["total"] == embedding + 2 * H + 2 * block + (H * H + H) + (3 * H + 3)
    counted = count_parameters(gpt2())
    assert counted["embedding"] == (VOCAB + 64) * H
    assert counted["non_embedding"] == 2 * ((4 * H * H + 4 * H) + (8 * H * H + 5 * H) + 4 * H) + 2 * H
    untied = gpt2(tie_word_embeddings=False)
    assert count_parameters(untied)["non_embedding"] == counted["non_embedding"] + VOCAB * H


def test_peak_of_a_chain_of_layers_by_hand() -> None:
    chain = nn.Sequential(nn.Linear(8, 100, bias=False), nn.ReLU(), nn.Linear(100, 4, bias=False))
    x = torch.zeros(10, 8)
    # The widest moment is in the ReLU: its argument and its result, 10 x 100 floats each.
    with torch.no_grad():
        assert peak_allocation(lambda: chain(x), CPU) == 2 * 10 * 100 * 4
        assert peak_allocation(lambda: x.t().reshape(10, 8).mul_(2), CPU) == 8 * 10 * 4
    with LiveBytes() as live:
        kept = x + 1
        assert live.now == kept.nbytes
        del kept
        assert live.now == 0


@pytest.mark.parametrize("make", [bert, gpt2, t5])
def test_peak_agrees_with_the_allocator(make) -> None:
    model = make()
    with inference(model):
        inputs = random_inputs(model, 8, SEQ, CPU)
        model(**inputs)
        ours = peak_allocation(lambda: model(**inputs), CPU)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            model(**inputs)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert ours == pytest.approx(peak, rel=0.02)


def test_cost_of_two_models(tmp_path: Path) -> None:
    teacher, student = bert(), bert(num_hidden_layers=1)
    student.save_pretrained(tmp_path)
    teacher.train()
    costs = measure_costs(
        {"teacher": teacher, "student": student},
        SEQ,
        EvaluationConfig(latency_batch_sizes=(1, 4)),
        {"teacher": None, "student": tmp_path},
        seconds=0.05,
    )
    assert teacher.training
    assert json.loads(json.dumps(costs, allow_nan=False)) == costs
    keys = {"parameters", "macs_per_token", "latency_ms", "peak_memory_mb", "size_mb", "size_from", "seq"}
    keys |= {"peak_memory_batch", "device", "dtype", "threads"}
    assert all(set(cost) == keys for cost in costs.values())
    big, small = costs["teacher"], costs["student"]
    assert set(big["latency_ms"]) == {"1", "4"}
    assert all(0 < cost["latency_ms"][batch] < 5000 for cost in costs.values() for batch in ("1", "4"))
    assert small["size_from"] == "safetensors"
    assert small["size_mb"] == (tmp_path / "model.safetensors").stat().st_size / 1e6
    assert big["size_from"] == "dtype"
    assert big["size_mb"] == 4 * big["parameters"]["total"] / 1e6
    assert (big["seq"], big["peak_memory_batch"], big["device"], big["dtype"]) == (SEQ, 4, "cpu", "float32")
    weights = 4 * small["parameters"]["total"] / 1e6
    assert small["peak_memory_mb"] > weights + 4 * 4 * SEQ * I / 1e6
    # A block more costs its weights, and at most one hidden state that is kept while it runs.
    more = big["peak_memory_mb"] - small["peak_memory_mb"] - (big["size_mb"] - weights)
    assert -1e-9 < more < 4 * 4 * SEQ * H / 1e6 + 1e-9
    assert measure_cost(teacher.bfloat16(), SEQ, SINGLE)["size_mb"] == big["size_mb"] / 2


def test_models_take_turns() -> None:
    calls: list[str] = []

    def forward(name: str, pause: float):
        def run() -> None:
            calls.append(name)
            time.sleep(pause)

        return run

    taken = interleaved_latency({"A": forward("A", 0.002), "B": forward("B", 0.02)}, seconds=0.1)
    assert calls == ["A", "B"] * (len(calls) // 2)
    assert WARM_UP_ROUNDS < len(calls) // 2 < MAX_ROUNDS
    assert 2 <= taken["A"] < 20 <= taken["B"] < 100
    calls.clear()
    interleaved_latency({"A": forward("A", 0.0)}, seconds=0.0)
    assert calls == ["A", "A"]


def test_inputs_are_ordinary_tokens_with_eos_last() -> None:
    model = gpt2()
    inputs = random_inputs(model, 3, SEQ, CPU)
    assert inputs["use_cache"] is False
    assert inputs["input_ids"].shape == (3, SEQ)
    assert (inputs["input_ids"][:, -1] == 1).all()
    assert int(inputs["input_ids"][:, :-1].min()) >= 2
    assert torch.equal(inputs["input_ids"], random_inputs(model, 3, SEQ, CPU)["input_ids"])
    assert "decoder_input_ids" in random_inputs(t5(), 1, SEQ, CPU)
    with pytest.raises(UserError, match="from 1 to 64"):
        random_inputs(model, 1, 65, CPU)


def test_classifiers_that_look_for_the_last_token() -> None:
    bart = BartConfig(
        vocab_size=VOCAB, d_model=H, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=I, decoder_ffn_dim=I, max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    shape = GPT2Config(vocab_size=VOCAB, n_embd=H, n_layer=1, n_head=4, n_positions=64, num_labels=3, pad_token_id=0)
    for model in (BartForSequenceClassification(bart), GPT2ForSequenceClassification(shape)):
        cost = measure_cost(model, SEQ, EvaluationConfig(latency_batch_sizes=(1, 3)), seconds=0.01)
        assert cost["macs_per_token"] > 0
        assert set(cost["latency_ms"]) == {"1", "3"}
