"""Compact blocks keep the rules of the blocks they replace, in every family; and have the published sizes."""

from __future__ import annotations

import pytest
import torch
import transformers
from compact_models import compact_model, with_compact_blocks
from tiny_models import DECODERS, ENCODERS, tiny_batch, tiny_model
from torch import nn
from transformers import PreTrainedModel

import layerdistill as ld
from layerdistill.evaluate.cost import count_macs
from layerdistill.models import count_parameters, empty_model, find_stacks
from layerdistill.models.causality import causality_problem, padding_problem
from layerdistill.models.compact import CompactShape, compact_width, describe_compact, new_compact_block
from layerdistill.models.modeling_compact import CompactBlock, put_block

FAMILIES = (*ENCODERS, *DECODERS)
GIVEN_POSITIONS = ("gpt2",)
"""Decoders with learned positions that do not find them from the mask."""


def draw_ids(rows: int, seq: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (rows, seq), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> PreTrainedModel:
    return compact_model(request.param)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_no_token_sees_a_later_one(decoder: PreTrainedModel, implementation: str) -> None:
    decoder.set_attn_implementation(implementation)
    ids = draw_ids(2, 12)
    before = decoder(ids).logits
    for place in (1, 6, 11):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] - 3 + 7) % 61 + 3
        after = decoder(changed).logits
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place:], before[:, place:])
    decoder.set_attn_implementation("sdpa")


@torch.no_grad()
def test_a_mask_of_ones_is_no_mask(decoder: PreTrainedModel) -> None:
    ids = draw_ids(2, 10)
    assert torch.equal(decoder(ids).logits, decoder(ids, attention_mask=torch.ones_like(ids)).logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_on_the_left_is_padding_on_the_right(decoder: PreTrainedModel, implementation: str) -> None:
    decoder.set_attn_implementation(implementation)
    real, padding = draw_ids(2, 7), torch.zeros(2, 4, dtype=torch.long)
    ones = torch.ones_like(real)
    positions = torch.arange(7).expand(2, -1)
    left = {"input_ids": torch.cat([padding, real], 1), "attention_mask": torch.cat([padding, ones], 1)}
    right = {"input_ids": torch.cat([real, padding], 1), "attention_mask": torch.cat([ones, padding], 1)}
    if decoder.config.model_type in GIVEN_POSITIONS:
        left["position_ids"] = torch.cat([padding, positions], 1)
        right["position_ids"] = torch.cat([positions, padding], 1)
    bare = decoder(real).logits
    torch.testing.assert_close(decoder(**right).logits[:, :7], bare, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(decoder(**left).logits[:, 4:], bare, atol=2e-5, rtol=1e-5)
    decoder.set_attn_implementation("sdpa")


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_the_cache_is_generation_without(decoder: PreTrainedModel, beams: int) -> None:
    real, padding = draw_ids(2, 6), torch.zeros(1, 2, dtype=torch.long)
    ids = torch.cat([torch.cat([padding, real[:1, 2:]], 1), real[1:]])
    mask = (ids != 0).long()
    texts = [
        decoder.generate(
            ids, attention_mask=mask, max_new_tokens=10, min_new_tokens=10, num_beams=beams, do_sample=False,
            use_cache=cached,
        )
        for cached in (True, False)
    ]  # fmt: skip
    assert texts[0].shape == (2, 16)
    assert torch.equal(*texts)


@torch.no_grad()
def test_every_inner_block_has_a_layer_of_the_cache_of_its_own(decoder: PreTrainedModel) -> None:
    ids = draw_ids(1, 9)
    whole = decoder(ids, use_cache=True)
    lengths = [layer.get_seq_length() for layer in whole.past_key_values.layers]
    assert lengths == [9] * (4 + 3), "four blocks, and a second inner block in three places"
    cache = decoder(ids[:, :5], use_cache=True).past_key_values
    steps = [decoder(ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits for place in range(5, 9)]
    torch.testing.assert_close(torch.cat(steps, 1), whole.logits[:, 5:], atol=2e-5, rtol=1e-5)


def test_sliding_windows_reach_the_inner_blocks() -> None:
    types = ["sliding_attention", "full_attention"] * 2
    host = tiny_model("qwen3", "causal-lm", layer_types=types, use_sliding_window=True, sliding_window=3)
    model = with_compact_blocks(host, 0, 1, num_inner_blocks=1)
    windows = [block.blocks[0].self_attn.sliding_window for block in find_stacks(model)[""].blocks[:2]]
    assert windows == [3, None]
    ids = draw_ids(1, 8)
    texts = [
        model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_padding_changes_nothing_in_encoders(family: str) -> None:
    model = compact_model(family)
    real, padding = draw_ids(2, 7), torch.zeros(2, 5, dtype=torch.long)
    ones = torch.ones_like(real)
    bare = model(real, attention_mask=ones).logits
    assert torch.equal(model(real).logits, bare)
    padded = model(torch.cat([real, padding], 1), attention_mask=torch.cat([ones, padding], 1)).logits
    torch.testing.assert_close(padded, bare, atol=2e-5, rtol=1e-5)
    last = real.clone()
    last[:, -1] = 3 + (last[:, -1] - 3 + 9) % 61
    assert not torch.allclose(model(last).logits, bare), "the blocks read in both directions"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_block_adds_nothing_while_its_last_matrix_is_zero(family: str) -> None:
    model = tiny_model(family, "base", hidden_size=48)
    description = describe_compact(model, CompactShape())
    for number in range(4):
        block = new_compact_block(model, description, number, seed=1)
        nn.init.zeros_(block.up.weight)
        put_block(model, description, number, block)
    with ld.capture(model, [0, 4]) as hidden:
        model(**tiny_batch(model))
    if family != "deberta-v2":  # a convolution follows its first block
        assert torch.equal(hidden[0], hidden[4])
    assert find_stacks(model)[""].depth == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_learns_and_the_stack_is_found(family: str) -> None:
    # As many inner blocks as blocks: their lists must not be taken for the model's.
    model = compact_model(family, 1, 2, num_inner_blocks=4)
    stack = find_stacks(model)[""]
    assert stack.block_names[1].endswith(".1")
    assert [type(block) is CompactBlock for block in stack.blocks] == [False, True, True, False]
    with ld.capture(model.train(), [1, 2, "final"]) as hidden:
        output = model(**tiny_batch(model))
    assert hidden[2].shape == (3, 8, 48)
    output.logits.square().sum().backward()
    without = [name for name, parameter in stack.blocks[1].named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "roberta"])
def test_the_position_table_can_be_left_out(family: str) -> None:
    models = [compact_model(family, 1, position_table=own).base_model for own in (True, False)]
    found = [next(part for part in model.modules() if isinstance(part, CompactBlock)).positions for model in models]
    assert found[0].weight.shape == (128, 12)
    assert found[1] is None


def test_roberta_counts_positions_as_its_own_table_does() -> None:
    model = compact_model("roberta", 1)
    ids = draw_ids(2, 6)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, position_ids=torch.arange(1, 7).expand(2, -1)).logits)


def test_widths_follow_the_models_heads() -> None:
    gpt2 = transformers.GPT2Config()
    assert compact_width(gpt2, CompactShape()) == (128, 2, 64)
    assert compact_width(gpt2, CompactShape(num_attention_heads=3)) == (192, 3, 64)
    assert compact_width(gpt2, CompactShape(hidden_size=96, num_attention_heads=4)) == (96, 4, 24)
    assert compact_width(transformers.Qwen3Config(hidden_size=1024, num_attention_heads=16, head_dim=128),
                         CompactShape()) == (128, 1, 128)  # fmt: skip
    with pytest.raises(ld.UserError, match="which 3 heads do not divide"):
        compact_width(gpt2, CompactShape(hidden_size=128, num_attention_heads=3))


# Published sizes


def ladder(config: transformers.PretrainedConfig, shape: CompactShape, count: int) -> tuple[int, list[int]]:
    """The parameters of a compact block, and of the model after 0, 1, ..., `count` blocks are replaced in turn."""
    model = empty_model(config, "causal-lm")
    description = describe_compact(model, shape)
    sizes, compact = [count_parameters(model)["total"]], set()
    for number in range(count):
        block = new_compact_block(model, description, number, seed=0)
        compact.add(count_parameters(block)["total"])
        put_block(model, description, number, block)
        sizes.append(count_parameters(model)["total"])
    (size,) = compact
    return size, sizes


def test_gpt2_has_the_published_sizes() -> None:
    size, sizes = ladder(transformers.GPT2Config(), CompactShape(128, 2, 2, 512), 12)
    assert size == 725_376
    assert sizes[:7] == [
        124_439_808, 118_077_312, 111_714_816, 105_352_320, 98_989_824, 92_627_328, 86_264_832,
    ]  # fmt: skip
    assert sizes[12] == 48_089_856
    assert round(100 * (1 - sizes[6] / sizes[0]), 2) == 30.68
    assert ladder(transformers.GPT2Config(), CompactShape(), 1)[0] == 725_376, "the defaults are the paper's for GPT-2"


def test_phi1_has_the_published_sizes() -> None:
    phi1 = transformers.PhiConfig(
        vocab_size=51200, hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, intermediate_size=8192,
        tie_word_embeddings=False,
    )  # fmt: skip
    size, sizes = ladder(phi1, CompactShape(512, 4, 1, 2048), 24)
    assert size == 14_706_176
    assert (sizes[0], sizes[1], sizes[6]) == (1_418_270_720, 1_382_622_720, 1_204_382_720)
    assert (sizes[12], sizes[24]) == (990_494_720, 562_718_720)
    assert round(100 * (1 - sizes[12] / sizes[0]), 2) == 30.16


def test_phi_rotates_half_of_the_inner_head() -> None:
    model = tiny_model("phi", "causal-lm")
    block = new_compact_block(model, describe_compact(model, CompactShape(16, 1, 1)), 1, seed=0)
    assert block.blocks[0].self_attn.rotary_ndims == 8
    cos, _ = block.rotary(torch.zeros(1, 3, 16), torch.arange(3)[None])
    assert cos.shape == (1, 3, 8)


def test_macs_fall() -> None:
    model, batch = tiny_model("gpt2", "causal-lm", hidden_size=48), {"input_ids": draw_ids(1, 16)}
    whole = count_macs(model, batch)
    block, compact = find_stacks(model)[""].blocks[2], None
    with_compact_blocks(model, 2)
    compact = find_stacks(model)[""].blocks[2]
    saved = sum(p.numel() for p in block.parameters() if p.dim() == 2) - sum(
        p.numel() for name, p in compact.named_parameters() if p.dim() == 2 and "positions" not in name
    )
    attention = 2 * 48 * 16 - 2 * 2 * 12 * 16
    assert (whole - count_macs(model, batch)) / 16 == pytest.approx(saved + attention, rel=0.02)


# Refusals


class SeesAll(CompactBlock):
    """Adds the mean over all tokens, later ones and padding too."""

    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        states = output[0] if isinstance(output, tuple) else output
        states = states + states.mean(1, keepdim=True)
        return (states, *output[1:]) if isinstance(output, tuple) else states


@pytest.mark.parametrize("family", FAMILIES)
def test_faults_of_blocks_are_found(family: str) -> None:
    model = compact_model(family, 1)
    model.train()
    modes = [module.training for module in model.modules()]
    assert padding_problem(model) is None
    assert (causality_problem(model) is None) == (family in DECODERS)
    next(block for block in model.modules() if isinstance(block, CompactBlock)).__class__ = SeesAll
    assert "the attention mask does not reach" in str(padding_problem(model))
    assert "a token sees those that follow it" in str(causality_problem(model))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_decoders_are_refused(family: str) -> None:
    with pytest.raises(ld.UserError, match="an encoder and a decoder"):
        describe_compact(tiny_model(family, "seq2seq-lm"), CompactShape())


def test_other_models_without_a_place_are_refused() -> None:
    with pytest.raises(ld.UserError, match="cross-attention"):
        describe_compact(tiny_model("gpt2", "causal-lm", add_cross_attention=True), CompactShape())
    with pytest.raises(ld.UserError, match="already has blocks of its own kind"):
        describe_compact(compact_model("gpt2", 1), CompactShape())
    model = tiny_model("llama", "causal-lm")
    odd = describe_compact(model, CompactShape(num_inner_blocks=1))
    odd["config"]["num_key_value_heads"] = 0
    with pytest.raises(ld.UserError, match="a compact block cannot be made"):
        new_compact_block(model, odd, 1, 0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_activation_checkpointing_changes_no_gradient(family: str) -> None:
    model, batch = compact_model(family).train(), {"input_ids": draw_ids(2, 8)}
    found = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch, use_cache=False).logits.square().mean().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    inner = [part for part in find_stacks(model)[""].blocks[2].blocks if part.gradient_checkpointing]
    assert len(inner) == 2
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_static_cache_has_room_for_the_inner_blocks(family: str) -> None:
    model, ids = compact_model(family), draw_ids(2, 5)
    cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :3], past_key_values=cache, use_cache=True).logits
        rest = model(ids[:, 3:], past_key_values=cache, use_cache=True).logits
    assert len(cache.layers) == 7
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, atol=2e-5, rtol=1e-5)


def test_dropout_inside_is_what_is_asked_for() -> None:
    model = tiny_model("gpt2", "causal-lm", resid_pdrop=0.3)
    description = describe_compact(model, CompactShape(dropout=0.2))
    block = new_compact_block(model, description, 0, seed=0)
    assert {part.p for part in block.modules() if isinstance(part, nn.Dropout)} == {0.2}
    own = new_compact_block(model, describe_compact(model, CompactShape()), 0, seed=0)
    assert {part.p for part in own.modules() if isinstance(part, nn.Dropout)} == {0.0, 0.3}
