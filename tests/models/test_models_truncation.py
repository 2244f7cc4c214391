"""Truncation keeps whole heads: with input in the kept dimensions, a kept head says what it said in the teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import FAMILIES, tiny_batch, tiny_model
from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.models import make_student

KEPT = 16
"""Hidden size of the students; the teachers have 32, in 4 heads of 8."""

SHAPE = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DIMS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}

MORE: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "falcon": lambda: hf.FalconConfig(**SHAPE, **DIMS, multi_query=False, ffn_hidden_size=64),
    "falcon-shared": lambda: hf.FalconConfig(**SHAPE, **DIMS, multi_query=True, ffn_hidden_size=64),
    "falcon-groups": lambda: hf.FalconConfig(
        **SHAPE, **DIMS, new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=64
    ),
    "bigcode": lambda: hf.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, multi_query=False, **SHAPE),
    "bigcode-shared": lambda: hf.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, multi_query=True, **SHAPE),
    "phi3": lambda: hf.Phi3Config(**SHAPE, **DIMS, num_key_value_heads=2),
    "persimmon": lambda: hf.PersimmonConfig(**SHAPE, **DIMS),
    "mistral-shared": lambda: hf.MistralConfig(**SHAPE, **DIMS, num_key_value_heads=1, head_dim=8),
}

INPUTS = (
    ".query", ".key", ".value", "query_proj", "key_proj", "value_proj", "q_proj", "k_proj", "v_proj", "qkv_proj",
    "Wqkv", "attn.c_attn", "query_key_value", "SelfAttention.q", "SelfAttention.k", "SelfAttention.v",
)  # fmt: skip
"""How the names end of what reads an attention's input."""

OUTPUTS = (
    "attention.output.dense", "attn.Wo", "attn.c_proj", "self_attn.out_proj", "attention.dense", "self_attn.o_proj",
    "self_attn.dense", "SelfAttention.o", "self_attention.dense",
)  # fmt: skip
"""How the names end of what reads the heads' outputs, side by side."""


def teacher_of(family: str) -> hf.PreTrainedModel:
    if family in MORE:
        torch.manual_seed(0)
        model = hf.AutoModel.from_config(MORE[family]()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model
    options: dict[str, Any] = {"norm_rel_ebd": "none"} if family == "deberta-v2" else {}
    model = tiny_model(family, num_layers=2, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if family == "deberta-v2":
            # The relative embeddings go through the same matrices as the input does, so they are cut alike.
            model.encoder.rel_embeddings.weight[:, KEPT:] = 0
    return model


def heads_on(model: hf.PreTrainedModel, given: Tensor) -> list[Tensor]:
    """Run a model with `given` (batch, seq, hidden) as the input of every attention; return what its heads say."""
    said: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (given, *args[1:]) if args[0].shape == given.shape else None

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        said.append(args[0])

    for name, module in model.named_modules():
        if name.endswith(INPUTS) and "encoder_attn" not in name:
            module.register_forward_pre_hook(replace)
        if name.endswith(OUTPUTS):
            module.register_forward_pre_hook(note)
    batch = tiny_batch(model, batch=2, seq=6)
    batch |= {key: batch["input_ids"] for key in batch if key == "decoder_input_ids"}
    batch.pop("decoder_attention_mask", None)
    with torch.no_grad():
        model(**batch)
    return said


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_kept_heads_say_what_they_said_in_the_teacher(family: str) -> None:
    teacher = teacher_of(family)
    student = make_student(teacher, hidden_size=KEPT, init="truncate")
    given = torch.randn(2, 6, KEPT, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([given, torch.zeros(2, 6, 32 - KEPT)], dim=-1)
    of_student, of_teacher = heads_on(student, given), heads_on(teacher, padded)
    assert len(of_student) == len(of_teacher) >= 2
    for mine, theirs in zip(of_student, of_teacher, strict=True):
        assert mine.shape[-1] == KEPT
        torch.testing.assert_close(mine, theirs[..., :KEPT])


def test_fused_matrices_are_cut_inside_each_part() -> None:
    gpt2 = tiny_model("gpt2")
    student = make_student(gpt2, hidden_size=KEPT, init="truncate")
    whole, cut = gpt2.h[0].attn.c_attn, student.h[0].attn.c_attn
    columns = [*range(16), *range(32, 48), *range(64, 80)]
    assert torch.equal(cut.weight, whole.weight[:16][:, columns])
    assert torch.equal(cut.bias, whole.bias[columns])

    modernbert = tiny_model("modernbert")
    student = make_student(modernbert, hidden_size=KEPT, init="truncate")
    assert torch.equal(student.layers[1].attn.Wqkv.weight, modernbert.layers[1].attn.Wqkv.weight[columns][:, :16])
    halves = [*range(32), *range(64, 96)]
    assert torch.equal(student.layers[1].mlp.Wi.weight, modernbert.layers[1].mlp.Wi.weight[halves][:, :16])
    assert torch.equal(student.layers[1].mlp.Wo.weight, modernbert.layers[1].mlp.Wo.weight[:16, :32])

    neox = tiny_model("gpt-neox")
    student = make_student(neox, hidden_size=KEPT, init="truncate")
    assert torch.equal(
        student.layers[0].attention.query_key_value.weight, neox.layers[0].attention.query_key_value.weight[:48, :16]
    )


def test_fused_matrices_where_positions_depend_on_the_number_of_heads() -> None:
    bloom = hf.BloomModel(hf.BloomConfig(hidden_size=32, n_layer=1, n_head=4, **SHAPE))  # head after head
    cut = make_student(bloom, hidden_size=KEPT, init="truncate").h[0].self_attention.query_key_value
    assert torch.equal(cut.weight, bloom.h[0].self_attention.query_key_value.weight[:48, :16])
    mpt = hf.MptModel(hf.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=64))  # all queries, all keys, ...
    cut = make_student(mpt, hidden_size=KEPT, init="truncate").blocks[0].attn.Wqkv
    rows = [*range(16), *range(32, 48), *range(64, 80)]
    assert torch.equal(cut.weight, mpt.blocks[0].attn.Wqkv.weight[rows][:, :16])


def test_fused_halves_that_are_as_wide_as_the_model() -> None:
    modernbert = tiny_model("modernbert", intermediate_size=16)  # Wi is 32 x 32: neither axis shows that it is fused
    student = make_student(modernbert, hidden_size=KEPT, init="truncate")
    halves = [*range(8), *range(16, 24)]
    assert torch.equal(student.layers[1].mlp.Wi.weight, modernbert.layers[1].mlp.Wi.weight[halves][:, :16])


def test_grouped_heads_keep_their_group() -> None:
    llama = tiny_model("llama", num_heads=8, hidden_size=64)  # 4 key/value heads, 2 queries each
    student = make_student(llama, hidden_size=32, init="truncate")
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (4, 2)
    assert student.config.head_dim == 8
    cut, whole = student.layers[0].self_attn, llama.layers[0].self_attn
    assert torch.equal(cut.k_proj.weight, whole.k_proj.weight[:16, :32])
    assert torch.equal(cut.o_proj.weight, whole.o_proj.weight[:32, :32])


def test_head_size_that_is_not_width_over_heads() -> None:
    qwen = tiny_model("qwen3", head_dim=12)
    student = make_student(qwen, hidden_size=16, init="truncate")
    assert (student.config.num_attention_heads, student.config.head_dim) == (2, 12)
    assert torch.equal(student.layers[0].self_attn.q_proj.weight, qwen.layers[0].self_attn.q_proj.weight[:24, :16])


def test_everything_that_follows_the_width_is_cut() -> None:
    opt = tiny_model("opt")
    assert make_student(opt, hidden_size=KEPT, init="truncate").config.word_embed_proj_dim == KEPT
    projected = tiny_model("opt", word_embed_proj_dim=8)
    student = make_student(projected, hidden_size=KEPT, init="truncate")
    assert student.config.word_embed_proj_dim == 8
    assert torch.equal(student.decoder.project_in.weight, projected.decoder.project_in.weight[:16])

    deberta = tiny_model("deberta-v2", "sequence-classification")
    student = make_student(deberta, hidden_size=KEPT, init="truncate")
    assert student.config.pooler_hidden_size == KEPT
    assert torch.equal(student.pooler.dense.weight, deberta.pooler.dense.weight[:16, :16])
    assert torch.equal(student.classifier.weight, deberta.classifier.weight[:, :16])

    t5 = tiny_model("t5")
    student = make_student(t5, hidden_size=KEPT, init="truncate")
    path = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert (student.config.num_heads, student.config.d_kv, student.config.d_ff) == (2, 8, 32)
    assert torch.equal(student.state_dict()[path], t5.state_dict()[path][:, :2])


def test_only_the_feed_forward_can_be_cut() -> None:
    for family, path in (("bert", "encoder.layer.0.intermediate.dense.weight"), ("gpt2", "h.0.mlp.c_fc.weight")):
        teacher = tiny_model(family)
        student = make_student(teacher, intermediate_size=24, init="truncate")
        whole, cut = teacher.state_dict()[path], student.state_dict()[path]
        axis = whole.shape.index(max(whole.shape))
        assert torch.equal(cut, whole.narrow(axis, 0, 24))


def test_heads_can_be_fewer_where_their_size_is_a_field_of_its_own() -> None:
    llama = tiny_model("llama")
    student = make_student(llama, num_attention_heads=2, init="truncate")
    assert (student.config.hidden_size, student.config.num_key_value_heads, student.config.head_dim) == (32, 1, 8)
    assert torch.equal(student.layers[0].self_attn.q_proj.weight, llama.layers[0].self_attn.q_proj.weight[:16])


def test_a_layout_that_is_not_known_is_refused() -> None:
    config = hf.CodeGenConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=64)
    teacher = hf.CodeGenModel(config)
    with pytest.raises(UserError, match=r"cannot cut h\.1\.attn\.qkv_proj\.weight from \(96, 32\) to \(48, 16\)"):
        make_student(teacher, num_blocks=1, hidden_size=16, init="truncate")
    assert len(make_student(teacher, num_blocks=1).h) == 1
