"""A student is a stock model: it runs, saves, reopens with plain transformers, and holds the teacher's tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import CLASSES, FAMILIES, FITTING, tiny_batch, tiny_model
from transformers import AutoConfig

from layerdistill.core.errors import UserError
from layerdistill.models import (
    block_sources,
    count_parameters,
    depths,
    empty_model,
    find_stacks,
    make_student,
    shrink_config,
    widths,
)

CASES = [(head, family) for head, families in FITTING.items() for family in families]
SHAPES = {
    "copy": {"num_blocks": 2, "init": "copy"},
    "truncate": {"num_blocks": 2, "hidden_size": 16, "init": "truncate"},
    "random": {"num_blocks": 2, "hidden_size": 16, "init": "random"},
}


@pytest.mark.parametrize("init", SHAPES)
@pytest.mark.parametrize(("head", "family"), CASES)
def test_every_family_and_head(head: str, family: str, init: str, tmp_path: Path) -> None:
    teacher = tiny_model(family, head)
    student = make_student(teacher, **SHAPES[init])
    assert set(depths(student).values()) == {2}
    assert set(widths(student).values()) == {32 if init == "copy" else 16}
    assert all(parameter.requires_grad for parameter in student.parameters())

    batch = tiny_batch(teacher)
    output = student(**batch)[0]
    assert torch.isfinite(output).all()

    student.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert set(student.state_dict()) == set(CLASSES[head].from_config(config).state_dict())
    reopened, info = CLASSES[head].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(reopened) is type(teacher)
    assert torch.equal(reopened.eval()(**batch)[0], output)


@pytest.mark.parametrize("init", ["copy", "truncate"])
@pytest.mark.parametrize(("head", "family"), CASES)
def test_same_depth_and_width_is_the_same_function(head: str, family: str, init: str) -> None:
    teacher = tiny_model(family, head)
    student = make_student(teacher, init=init)
    batch = tiny_batch(teacher)
    assert torch.equal(student(**batch)[0], teacher(**batch)[0])
    assert student is not teacher
    own = {parameter.data_ptr() for parameter in student.parameters()}
    assert not own & {parameter.data_ptr() for parameter in teacher.parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_copied_blocks_are_the_mapped_teacher_blocks(family: str) -> None:
    teacher = tiny_model(family)
    student = make_student(teacher, copy_map=[3, 1])
    teacher_stacks = find_stacks(teacher)
    lacking = set()
    for name, stack in find_stacks(student).items():
        for block, source in zip(stack.blocks, (3, 1), strict=True):
            theirs = teacher_stacks[name].blocks[source].state_dict()
            for key, tensor in block.state_dict().items():
                if key in theirs:
                    assert torch.equal(tensor, theirs[key]), key
                else:
                    lacking.add(key)
    outside = [
        name
        for name in student.state_dict()
        if not name.startswith(tuple(s.block_path for s in teacher_stacks.values()))
    ]
    assert outside
    for name in outside:
        assert torch.equal(student.state_dict()[name], teacher.state_dict()[name]), name
    assert lacking == ({"layer.0.SelfAttention.relative_attention_bias.weight"} if family == "t5" else set())


def test_what_the_chosen_block_lacks_comes_from_the_nearest_block_that_has_it() -> None:
    t5 = tiny_model("t5")
    student = make_student(t5, copy_map=[2, 3])
    path = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(student.state_dict()[path], t5.state_dict()[path])
    modernbert = tiny_model("modernbert")
    student = make_student(modernbert, copy_map=[2, 0])
    expected = modernbert.state_dict()["layers.1.attn_norm.weight"]
    assert torch.equal(student.state_dict()["layers.1.attn_norm.weight"], expected)


@pytest.mark.parametrize(
    ("copy_map", "sources"),
    [
        ("forward", {(12, 6): (1, 3, 5, 7, 9, 11), (12, 5): (2, 4, 7, 9, 11), (4, 4): (0, 1, 2, 3), (12, 1): (11,)}),
        ("reverse", {(12, 3): (11, 7, 3)}),
        ("first", {(12, 3): (0, 1, 2)}),
        ("last", {(12, 3): (9, 10, 11)}),
        (
            "spread",
            {
                (12, 3): (0, 6, 11),
                (12, 6): (0, 2, 4, 7, 9, 11),
                (6, 4): (0, 2, 3, 5),
                (4, 1): (0,),
                (4, 4): (0, 1, 2, 3),
            },
        ),
        ("skip", {(12, 6): (0, 2, 4, 6, 8, 10), (12, 5): (0, 2, 4, 7, 9)}),
        ([4, 0, 4], {(6, 3): (4, 0, 4)}),
    ],
)
def test_copy_maps(copy_map: str | list[int], sources: dict[tuple[int, int], tuple[int, ...]]) -> None:
    for (teacher, student), expected in sources.items():
        assert block_sources({"": teacher}, student, copy_map) == {"": expected}


def test_random_copy_map_is_distinct_in_order_and_drawn_from_the_seed() -> None:
    drawn = {seed: block_sources({"": 24}, 6, "random", seed)[""] for seed in range(5)}
    for blocks in drawn.values():
        assert sorted(set(blocks)) == list(blocks)
        assert len(blocks) == 6
    assert len(set(drawn.values())) > 1
    assert block_sources({"": 24}, 6, "random", 3)[""] == drawn[3]


def test_a_list_gives_the_depth_and_stacks_may_differ() -> None:
    assert depths(make_student(tiny_model("bert"), copy_map=[0, 3, 1])) == {"": 3}
    student = make_student(tiny_model("bart"), num_blocks={"encoder": 3, "decoder": 1})
    assert depths(student) == {"encoder": 3, "decoder": 1}
    assert depths(make_student(tiny_model("t5"), num_blocks={"encoder": 1, "decoder": 2})) == {
        "encoder": 1,
        "decoder": 2,
    }


def test_fields_with_an_entry_per_block_follow_the_blocks() -> None:
    modernbert = tiny_model("modernbert", num_layers=6)
    assert modernbert.config.layer_types[3] == "full_attention"
    student = make_student(modernbert, copy_map=[0, 1, 3])
    assert student.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    windows = [layer.attn.sliding_window is None for layer in student.layers]
    assert windows == [True, False, True]
    random = make_student(modernbert, num_blocks=2, init="random", copy_map="last")
    assert random.config.layer_types == modernbert.config.layer_types[:2]

    qwen = tiny_model("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=2, layer_types=None)
    assert qwen.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    student = make_student(qwen, num_blocks=2)
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    assert student.config.max_window_layers == 2
    assert [layer.self_attn.sliding_window for layer in student.layers] == [None, 4]


def test_a_list_as_long_as_the_depth_that_is_not_per_block_stays() -> None:
    student = make_student(tiny_model("deberta-v2", num_layers=2), num_blocks=1)
    assert student.config.pos_att_type == ["p2c", "c2p"]
    llama = tiny_model("llama", num_layers=2, eos_token_id=[2, 3])
    assert make_student(llama, num_blocks=1).config.eos_token_id == [2, 3]


@pytest.mark.parametrize("family", FITTING["causal-lm"])
def test_ties_dtype_and_generation_settings_are_kept(family: str) -> None:
    teacher = tiny_model(family, "causal-lm", tie_word_embeddings=True).to(torch.bfloat16)
    teacher.generation_config.max_new_tokens = 7
    student = make_student(teacher, **SHAPES["truncate"])
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.generation_config.max_new_tokens == 7
    untied = tiny_model(family, "causal-lm", tie_word_embeddings=False)
    student = make_student(untied, **SHAPES["truncate"])
    assert student.get_output_embeddings().weight is not student.get_input_embeddings().weight
    assert torch.equal(student.get_output_embeddings().weight, untied.get_output_embeddings().weight[:, :16])


def test_random_students_depend_on_the_seed_alone_and_leave_the_generator() -> None:
    teacher = tiny_model("bert")
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, again, other = (make_student(teacher, num_blocks=1, init="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], teacher.state_dict()[name])


def test_a_student_of_a_frozen_teacher_trains_and_the_teacher_is_untouched() -> None:
    teacher = tiny_model("gpt2", "causal-lm").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = make_student(teacher, num_blocks=2)
    student(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert teacher.config.num_hidden_layers == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


ERRORS = {
    "deeper": ("bert", {"num_blocks": 5}, r"num_blocks is 5.*has 4 blocks.*1 to 4"),
    "empty": ("bert", {"num_blocks": 0}, r"num_blocks is 0"),
    "wider": ("bert", {"hidden_size": 64, "init": "truncate"}, r"hidden_size is 64.*teacher's is 32"),
    "cut head": ("bert", {"hidden_size": 20, "init": "truncate"}, r"hidden_size 20.*4 heads in 32.*16, 24"),
    "cut group": ("llama", {"hidden_size": 24, "init": "truncate"}, r"in groups of 2.*16, 32"),
    "copy and narrow": ("bert", {"hidden_size": 16}, r"init: copy takes whole.*hidden_size.*truncate"),
    "copy and thin": ("bert", {"intermediate_size": 32}, r"init: copy.*intermediate_size"),
    "wide middle": ("bert", {"intermediate_size": 65, "init": "truncate"}, r"intermediate_size is 65.*64"),
    "other heads": ("bert", {"num_attention_heads": 2, "init": "truncate"}, r"heads of 16.*teacher's have 8"),
    "odd heads": ("llama", {"num_attention_heads": 3, "init": "truncate"}, r"num_attention_heads is 3.*multiple of 2"),
    "map": ("bert", {"copy_map": "foward"}, r"copy_map.*'foward'.*Did you mean 'forward'"),
    "map length": ("bert", {"num_blocks": 2, "copy_map": [0]}, r"copy_map is \[0\].*list 2 teacher blocks"),
    "map range": ("bert", {"num_blocks": 2, "copy_map": [1, 4]}, r"from 0 to 3"),
    "init": ("bert", {"init": "cpy"}, r"init is 'cpy'.*Did you mean 'copy'"),
    "stacks": ("bert", {"num_blocks": {"encoder": 2, "decoder": 2}}, r"only one: give a plain number"),
    "stack missing": ("bart", {"num_blocks": {"encoder": 2}}, r"names the stacks \['encoder'\]"),
    "stack deeper": ("bart", {"num_blocks": {"encoder": 2, "decoder": 9}}, r"num_blocks \(decoder\) is 9"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_made_is_refused(name: str) -> None:
    family, shape, message = ERRORS[name]
    teacher = tiny_model(family)
    with pytest.raises(UserError, match=message):
        make_student(teacher, **shape)
    with pytest.raises(UserError, match=message):
        shrink_config(teacher.config, **shape)


def test_adapters_and_quantised_weights_are_refused() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model("bert"), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(UserError, match="merge_and_unload"):
        make_student(wrapped, num_blocks=2)
    bert = tiny_model("bert")
    bert.pooler.dense.weight = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        make_student(bert, num_blocks=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_shrunken_configuration_is_the_students_and_counts_without_weights(family: str) -> None:
    teacher = tiny_model(family)
    shape = SHAPES["truncate"]
    config = shrink_config(teacher.config, **shape)
    student = make_student(teacher, **shape)
    assert config.to_dict() == student.config.to_dict()
    empty = empty_model(config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert count_parameters(empty) == count_parameters(student)


def test_counts() -> None:
    tied = tiny_model("gpt2", "causal-lm", num_layers=1)
    block = 12 * 32 * 32 + 13 * 32  # attention 4 d^2 + 4 d, feed-forward 8 d^2 + 5 d, two norms 4 d
    tables = 64 * 32 + 128 * 32
    expected = {"total": block + tables + 64, "embedding": tables, "non_embedding": block + 64}
    assert count_parameters(tied) == expected | {"trainable": block + tables + 64}
    tied.transformer.wpe.requires_grad_(False)
    assert count_parameters(tied)["trainable"] == block + 64 * 32 + 64
    without = count_parameters(tied, embeddings=False)
    assert without["total"] == without["trainable"] == block + 64


def test_empty_model_has_the_head_of_the_task() -> None:
    config = tiny_model("bert").config
    base, head = empty_model(config), empty_model(config, "sequence-classification", num_labels=5)
    assert count_parameters(head)["total"] - count_parameters(base)["total"] == 5 * 32 + 5
    assert config.num_labels == 2, "the configuration that was given is left as it is"
    with pytest.raises(UserError, match=r"task is 'clasification'.*must be one of"):
        empty_model(config, "clasification")
