"""Blocks removed in place leave a stock model: the same as reopened, and the same as a student made of what is left."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny_models import COMMON, DECODERS, ENCODERS, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import layerdistill as ld
from layerdistill.core.errors import UserError
from layerdistill.models import depths, find_stacks
from layerdistill.models.remove_blocks import remove_blocks

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, **COMMON,
}  # fmt: skip
MIXED = {
    "qwen2": hf.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=3),
    "gemma2": hf.Gemma2Config(**SMALL, head_dim=8, sliding_window=4),
    "gemma3": hf.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4, sliding_window_pattern=3),
    "gpt-oss-like": hf.Qwen3Config(
        **SMALL, head_dim=8, sliding_window=4, use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"] * 3,
    ),
    "gpt-neo": hf.GPTNeoConfig(
        hidden_size=32, num_layers=6, num_heads=4, attention_types=[[["global", "local"], 3]], window_size=4,
        vocab_size=64, max_position_embeddings=64, embed_dropout=0.0, attention_dropout=0.0, resid_dropout=0.0,
        **COMMON,
    ),
    "gpt2-scaled": hf.GPT2Config(
        n_embd=32, n_layer=6, n_head=4, n_positions=64, vocab_size=64, scale_attn_by_inverse_layer_idx=True, **COMMON
    ),
}  # fmt: skip
FAMILIES = (*ENCODERS, *DECODERS)


def model_of(case: str) -> PreTrainedModel:
    if case in MIXED:
        torch.manual_seed(1)
        made = hf.AutoModelForCausalLM.from_config(copy.deepcopy(MIXED[case]))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return made.eval()
    head = "sequence-classification" if case in ENCODERS else "causal-lm"
    return tiny_model(case, head, num_layers=6, seed=4)


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


@pytest.mark.parametrize("case", [*FAMILIES, *MIXED])
@pytest.mark.parametrize("gone", [[0, 3], [1], [2, 4, 5]], ids=str)
def test_what_is_left_is_stock(case: str, gone: list[int], tmp_path: Path) -> None:
    model = model_of(case)
    kept = [block for block in range(6) if block not in gone]
    batch = tiny_batch(model, seq=12)
    whole = logits(model, batch)
    expected = ld.make_student(model, copy_map=kept)
    untouched = dict(model.named_parameters())
    remove_blocks(model, gone)
    assert depths(model) == {"": len(kept)}
    assert model.config.to_dict() == expected.config.to_dict()
    assert set(model.state_dict()) == set(expected.state_dict())
    assert {id(parameter) for parameter in model.parameters()} <= {id(parameter) for parameter in untouched.values()}
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(again.eval(), batch), logits(model, batch))
    torch.testing.assert_close(logits(expected, batch), logits(model, batch), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(whole, logits(model, batch), atol=1e-4)


@pytest.mark.parametrize("case", [*DECODERS, "qwen2", "gemma2", "gpt-neo"])
def test_generation_with_a_cache_is_that_of_the_reopened_model(case: str, tmp_path: Path) -> None:
    model = model_of(case)
    remove_blocks(model, [1, 2])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    prompt = torch.tensor([[1, 5, 9, 13, 17, 21]])
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "eos_token_id": None}
    assert torch.equal(model.generate(prompt, **options), again.generate(prompt, **options))


def test_removing_twice_is_removing_both() -> None:
    one, two = model_of("qwen2"), model_of("qwen2")
    remove_blocks(one, [4])
    remove_blocks(one, [1])
    remove_blocks(two, [1, 4])
    assert one.config.to_dict() == two.config.to_dict()
    batch = tiny_batch(one)
    assert torch.equal(logits(one, batch), logits(two, batch))
    assert [block.self_attn.layer_idx for block in find_stacks(one)[""].blocks] == [0, 1, 2, 3]


@pytest.mark.parametrize("gone", [[6], [-1], list(range(6))], ids=str)
def test_what_is_not_there_cannot_be_removed(gone: list[int]) -> None:
    with pytest.raises(UserError, match=r"must be numbers from 0 to 5 and leave at least one"):
        remove_blocks(model_of("bert"), gone)


def test_a_block_that_does_not_fit_its_new_place_is_refused_and_nothing_changes() -> None:
    config = hf.Qwen2MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        decoder_sparse_step=2,
    )  # fmt: skip
    model = hf.Qwen2MoeForCausalLM(config).eval()
    before = model.config.to_dict()
    with pytest.raises(UserError, match=r"Block 1 cannot become block 0: .* built differently by their place"):
        remove_blocks(model, [0])
    assert model.config.to_dict() == before
    assert depths(model) == {"": 6}


def test_two_stacks_are_refused() -> None:
    with pytest.raises(UserError, match="an encoder and a decoder"):
        remove_blocks(tiny_model("bart", "seq2seq-lm"), [0])
