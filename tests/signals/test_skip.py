"""A model that skips blocks computes what a stock model built without them computes, and is itself again afterwards."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DECODERS, ENCODERS, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import layerdistill as ld
from layerdistill.core.errors import UserError
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.models import find_stacks
from layerdistill.signals.skip import skipped

MIXED = {
    "qwen2": ("qwen3", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2}),
    "deberta-conv": ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
    "modernbert-pattern": ("modernbert", {"layer_types": ["full_attention", *["sliding_attention"] * 2] * 2}),
}
CASES = {family: (family, {}) for family in (*ENCODERS, *DECODERS)} | MIXED


def model_of(case: str) -> PreTrainedModel:
    family, options = CASES[case]
    layers = len(options.get("layer_types", range(4)))
    head = "sequence-classification" if family in ENCODERS else "causal-lm"
    return tiny_model(family, head, num_layers=layers, seed=4, **options)


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gone", [[0], [1], [3], [0, 2]], ids=str)
def test_skipping_is_the_stock_model_without_the_blocks(case: str, gone: list[int]) -> None:
    model = model_of(case)
    batch = tiny_batch(model, seq=12)
    depth = find_stacks(model)[""].depth
    kept = [block for block in range(depth) if block not in gone]
    before, whole, cached = fingerprint_model(model), logits(model, batch), getattr(model.config, "use_cache", None)
    smaller = ld.make_student(model, num_blocks=len(kept), copy_map=kept)
    with skipped(model, gone):
        found = logits(model, batch)
        assert not getattr(model.config, "use_cache", None)
    torch.testing.assert_close(found, logits(smaller, batch), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found, whole, atol=1e-4)
    assert torch.equal(logits(model, batch), whole)
    assert fingerprint_model(model) == before
    assert getattr(model.config, "use_cache", None) == cached


def test_all_is_put_back_after_an_exception() -> None:
    for case in ("llama", "deberta-conv", "modernbert"):
        model = model_of(case)
        batch = tiny_batch(model)
        whole = logits(model, batch)
        order = [id(block) for block in find_stacks(model)[""].blocks]
        with pytest.raises(RuntimeError, match="out of the block"), skipped(model, [0, 1]):
            raise RuntimeError("out of the block")
        assert [id(block) for block in find_stacks(model)[""].blocks] == order
        assert all("forward" not in vars(block) for block in find_stacks(model)[""].blocks)
        assert torch.equal(logits(model, batch), whole)


@pytest.mark.parametrize("case", ["gpt2", "llama", "opt", "qwen2"])
def test_generation_goes_without_a_cache(case: str) -> None:
    model = model_of(case)
    smaller = ld.make_student(model, copy_map=[1, 3])
    prompt = torch.tensor([[1, 5, 9, 13]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with skipped(model, [0, 2]):
        found = model.generate(prompt, **options)
    assert torch.equal(found, smaller.generate(prompt, **options))


def test_gradients_reach_what_is_left_and_training_draws_the_same_numbers() -> None:
    model = model_of("bert").train()
    batch = tiny_batch(model)
    state = torch.random.get_rng_state()
    with skipped(model, [1]):
        model(**batch).logits.sum().backward()
    assert torch.equal(torch.random.get_rng_state(), state), "the probed block draws nothing that others would"
    touched = [block.output.dense.weight.grad is not None for block in model.bert.encoder.layer]
    assert touched == [True, False, True, True]


@pytest.mark.parametrize("gone", [[4], [-1], [0, 1, 2, 3]], ids=str)
def test_blocks_that_are_not_there(gone: list[int]) -> None:
    with (
        pytest.raises(UserError, match="must be numbers from 0 to 3 and leave at least one"),
        skipped(model_of("bert"), gone),
    ):
        pass


def test_what_cannot_be_skipped_is_refused() -> None:
    t5 = tiny_model("t5", "seq2seq-lm")
    with pytest.raises(UserError, match="stack is '', but T5ForConditionalGeneration has 'encoder' and 'decoder'"):
        skipped(t5, [1]).__enter__()
    batch = tiny_batch(t5)
    with pytest.raises(UserError, match="hand more than hidden states"), skipped(t5, [1], "encoder"):
        t5(**batch)
    scaled = tiny_model("gpt2", "causal-lm", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UserError, match="by the number of the block"), skipped(scaled, [1]):
        pass


def test_one_stack_of_two() -> None:
    bart = tiny_model("bart", "seq2seq-lm")
    batch = tiny_batch(bart)
    smaller = ld.make_student(bart, num_blocks={"encoder": 4, "decoder": 3}, copy_map="first")
    with skipped(bart, [3], "decoder"):
        torch.testing.assert_close(logits(bart, batch), logits(smaller, batch), atol=1e-6, rtol=1e-5)
