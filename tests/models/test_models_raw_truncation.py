"""Raw truncation takes the plain first rows and columns, through heads too, but never across fused parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import tiny_batch, tiny_model

from layerdistill.core.errors import UserError
from layerdistill.models import count_parameters, empty_model, make_student, shrink_config

SEPARATE = ("bert", "roberta", "deberta-v2", "opt", "llama", "phi", "bart", "t5")
"""Families with a matrix each for queries, keys and values; the teachers have 4 heads of 8 in 32."""


def plain(whole: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The first entries along every axis."""
    return whole[tuple(slice(0, size) for size in shape)]


@pytest.mark.parametrize("family", SEPARATE)
@pytest.mark.parametrize("shape", [{"hidden_size": 16, "num_attention_heads": 4}, {"hidden_size": 24}], ids=str)
def test_every_tensor_is_its_teachers_first_rows_and_columns(
    family: str, shape: dict[str, int], tmp_path: Path
) -> None:
    teacher = tiny_model(family)
    student = make_student(teacher, **shape, init="truncate_raw")
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, plain(theirs[name], tensor.shape)), name
    output = student(**tiny_batch(student))[0]
    assert torch.isfinite(output).all()
    student.save_pretrained(tmp_path)
    again = hf.AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**tiny_batch(student))[0], output)


def test_heads_may_be_cut_through_and_be_more_than_the_teachers() -> None:
    bert = tiny_model("bert")
    with pytest.raises(UserError, match="hidden_size 20 is not a whole number"):
        make_student(bert, hidden_size=20, init="truncate")
    for shape, heads in (
        ({"hidden_size": 20}, 4),  # 2.5 of the teacher's heads: their number is kept, 4 heads of 5
        ({"hidden_size": 20, "num_attention_heads": 5}, 5),
        ({"hidden_size": 24}, 3),  # whole heads, so their size is kept
        ({"hidden_size": 24, "num_attention_heads": 8}, 8),
        ({"num_attention_heads": 2}, 2),
    ):
        student = make_student(bert, **shape, init="truncate_raw")
        width = shape.get("hidden_size", 32)
        assert (student.config.hidden_size, student.config.num_attention_heads) == (width, heads)
        query = student.encoder.layer[1].attention.self.query
        assert torch.equal(query.weight, bert.encoder.layer[1].attention.self.query.weight[:width, :width])
        assert torch.equal(query.bias, bert.encoder.layer[1].attention.self.query.bias[:width])


@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert", "gpt-neox", "qwen3", "t5"])
def test_where_no_head_is_cut_it_is_truncation(family: str) -> None:
    teacher = tiny_model(family)
    raw, aligned = (
        make_student(teacher, num_blocks=2, hidden_size=16, init=init) for init in ("truncate_raw", "truncate")
    )
    assert raw.config.to_dict() == aligned.config.to_dict()
    for name, tensor in aligned.state_dict().items():
        assert torch.equal(tensor, raw.state_dict()[name]), name


def test_each_part_of_a_fused_matrix_is_cut_on_its_own() -> None:
    gpt2 = tiny_model("gpt2")
    student = make_student(gpt2, hidden_size=20, init="truncate_raw")
    columns = [*range(20), *range(32, 52), *range(64, 84)]
    assert torch.equal(student.h[0].attn.c_attn.weight, gpt2.h[0].attn.c_attn.weight[:20][:, columns])
    modernbert = tiny_model("modernbert")
    student = make_student(modernbert, hidden_size=24, num_attention_heads=2, init="truncate_raw")
    rows = [*range(24), *range(32, 56), *range(64, 88)]
    assert torch.equal(student.layers[0].attn.Wqkv.weight, modernbert.layers[0].attn.Wqkv.weight[rows][:, :24])


@pytest.mark.parametrize("shape", [{"hidden_size": 16, "num_attention_heads": 1}, {"num_attention_heads": 2}], ids=str)
def test_a_matrix_that_follows_head_after_head_is_not_read_in_heads_of_another_size(shape: dict[str, int]) -> None:
    """GPT-NeoX holds query, key and value of a head together: other heads would mix them, even at equal shapes."""
    with pytest.raises(UserError, match=r"cannot cut .*query_key_value.*truncate_raw too"):
        make_student(tiny_model("gpt-neox"), **shape, init="truncate_raw")


def test_a_head_size_that_is_a_field_follows() -> None:
    llama = make_student(tiny_model("llama"), hidden_size=24, num_attention_heads=2, init="truncate_raw")
    assert (llama.config.head_dim, llama.config.num_key_value_heads) == (12, 1)
    t5 = make_student(tiny_model("t5"), hidden_size=20, init="truncate_raw")
    assert (t5.config.num_heads, t5.config.d_kv) == (4, 5)
    own = make_student(tiny_model("qwen3", head_dim=12), hidden_size=20, num_attention_heads=4, init="truncate_raw")
    assert own.config.head_dim == 12, "a size that does not follow from width and heads is left"


@pytest.mark.parametrize(
    ("family", "shape", "message"),
    [
        ("bert", {"hidden_size": 20, "num_attention_heads": 3}, r"num_attention_heads is 3 for hidden_size 20.*divide"),
        ("bert", {"hidden_size": 18}, r"num_attention_heads is 4 for hidden_size 18.*Give num_attention_heads"),
        ("llama", {"hidden_size": 18, "num_attention_heads": 3}, r"multiple of 2"),
        ("phi", {"hidden_size": 24, "num_attention_heads": 4}, r"4 for hidden_size 24.*even number of dimensions"),
        ("bert", {"hidden_size": 40}, r"hidden_size is 40.*teacher's is 32"),
    ],
)
def test_what_cannot_be_is_refused(family: str, shape: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_student(tiny_model(family), **shape, init="truncate_raw")


# The students of Dasgupta and Cohn (2025), as their released code lists them


@pytest.mark.parametrize(
    ("blocks", "width", "middle", "heads", "millions"),
    [
        (6, 384, 1536, 6, 22.7), (12, 384, 1536, 12, 33.4), (6, 768, 3072, 6, 67.0), (8, 512, 3072, 8, 49.8),
        (12, 512, 3072, 16, 66.6), (6, 512, 3072, 8, 41.4),
    ],
)  # fmt: skip
def test_published_bert_students(blocks: int, width: int, middle: int, heads: int, millions: float) -> None:
    shape: dict[str, Any] = {"num_blocks": blocks, "hidden_size": width, "intermediate_size": middle}
    config = shrink_config(hf.BertConfig(), **shape, num_attention_heads=heads, init="truncate_raw")
    assert config.num_attention_heads == heads
    assert round(count_parameters(empty_model(config))["total"] / 1e6, 1) == millions
    if 12 * width == 768 * heads:
        assert shrink_config(hf.BertConfig(), **shape, init="truncate").to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("blocks", "width", "middle", "heads", "millions"),
    [(3, 768, 4096, 16, 99), (6, 768, 3072, 16, 139), (6, 1024, 4096, 16, 230), (12, 640, 4096, 16, 219)],
)
def test_published_bart_students(blocks: int, width: int, middle: int, heads: int, millions: int) -> None:
    shape = {"num_blocks": blocks, "hidden_size": width, "intermediate_size": middle}
    config = shrink_config(hf.BartConfig(), **shape, num_attention_heads=heads, init="truncate_raw")
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (heads, heads)
    assert round(count_parameters(empty_model(config))["total"] / 1e6) == millions
