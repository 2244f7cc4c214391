"""Blocks, norms, embeddings and heads are found by structure in every family, and a failure says what to do."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tiny_models import ENCODER_DECODERS, FAMILIES, FITTING, tiny_batch, tiny_model
from torch import nn

from layerdistill.core.errors import UserError
from layerdistill.core.types import StackName
from layerdistill.models import (
    depths,
    depths_from_config,
    find_embeddings,
    find_head,
    find_stacks,
    structure,
    unwrap,
    widths,
    widths_from_config,
)

CASES = [(head, family) for head, families in FITTING.items() for family in families]


@pytest.mark.parametrize(("head", "family"), CASES)
def test_stacks_of_every_family_and_head(head: str, family: str) -> None:
    model = tiny_model(family, head, num_layers=3)
    stacks = find_stacks(model)
    one_stack = family not in ENCODER_DECODERS or (head == "token-classification" and family == "t5")
    assert list(stacks) == ([""] if one_stack else ["encoder", "decoder"])
    for name, stack in stacks.items():
        assert (stack.name, stack.depth, stack.width) == (name, 3, 32)
        assert len({type(block) for block in stack.blocks}) == 1
        for block, path in zip(stack.blocks, stack.block_names, strict=True):
            assert model.get_submodule(path) is block
    assert depths(model) == dict.fromkeys(stacks, 3)
    assert widths(model) == dict.fromkeys(stacks, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_alone_says_the_same(family: str) -> None:
    model = tiny_model(family, num_layers=3)
    assert depths_from_config(model.config) == depths(model)
    assert widths_from_config(model.config) == widths(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_of_one_and_of_two_is_not_confused_with_smaller_lists(family: str) -> None:
    for layers in (1, 2):
        assert set(depths(tiny_model(family, num_layers=layers)).values()) == {layers}


def test_encoder_and_decoder_of_different_depths() -> None:
    bart = tiny_model("bart", encoder_layers=3, decoder_layers=1)
    t5 = tiny_model("t5", num_layers=2, num_decoder_layers=4)
    assert depths(bart) == depths_from_config(bart.config) == {"encoder": 3, "decoder": 1}
    assert depths(t5) == depths_from_config(t5.config) == {"encoder": 2, "decoder": 4}


FINAL_NORMS = {
    "bert": None,
    "deberta-v2": None,  # encoder.LayerNorm normalises the relative embeddings
    "roberta": None,
    "modernbert": "final_norm",
    "gpt2": "ln_f",
    "opt": "decoder.final_layer_norm",
    "gpt-neox": "final_layer_norm",
    "llama": "norm",
    "qwen3": "norm",
    "phi": "final_layernorm",
    "bart": None,  # layernorm_embedding comes before the blocks
    "t5": "decoder.final_layer_norm",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_final_norm(family: str) -> None:
    model = tiny_model(family)
    stack = list(find_stacks(model).values())[-1]
    assert stack.final_norm_path == FINAL_NORMS[family]
    assert (stack.final_norm is None) == (stack.final_norm_path is None)


def test_final_norm_beside_the_module_that_holds_the_blocks() -> None:
    config = hf.RobertaPreLayerNormConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = hf.RobertaPreLayerNormForSequenceClassification(config)
    assert find_stacks(model)[""].final_norm is model.roberta_prelayernorm.LayerNorm


@pytest.mark.parametrize(("head", "family"), CASES)
def test_embeddings_and_head(head: str, family: str) -> None:
    model = tiny_model(family, head)
    embeddings, found = find_embeddings(model), find_head(model)
    assert isinstance(embeddings, nn.Embedding)
    assert embeddings.num_embeddings == 64
    if head == "base":
        assert found is None
        return
    made = []
    assert found is not None
    found.register_forward_hook(lambda module, args, output: made.append(output))
    logits = model(**tiny_batch(model)).logits
    # A decoder's classifier scores every position, and the logits are those of one.
    assert torch.isin(logits.flatten(), made[-1].flatten()).all()


def test_wrappers_are_looked_through() -> None:
    model = tiny_model("bert")
    assert unwrap(nn.DataParallel(model)) is model
    assert find_stacks(nn.DataParallel(model))[""].block_path == "encoder.layer"
    with pytest.raises(UserError, match="Linear is not a Hugging Face model"):
        find_stacks(nn.Linear(2, 2))


def test_no_block_list_is_a_clear_error() -> None:
    config = hf.AlbertConfig(
        vocab_size=64,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
    )
    with pytest.raises(UserError, match=r"AlbertModel.*4 blocks.*found none.*blocks='path"):
        find_stacks(hf.AlbertModel(config))


def test_two_lists_that_could_be_meant_are_a_clear_error_and_blocks_overrules() -> None:
    model = tiny_model("gpt2")
    model.other = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(4)])
    with pytest.raises(UserError, match=r"found 2 of them \(h, other\)"):
        find_stacks(model)
    assert find_stacks(model, blocks="h")[""].blocks == tuple(model.h)
    with pytest.raises(UserError, match=r"Its lists are: h, other"):
        find_stacks(model, blocks="nowhere")


def test_blocks_that_were_replaced_or_taken_out_are_seen_and_nothing_else_is_searched_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("bert", "sequence-classification", num_layers=4)
    first = find_stacks(model)[""]
    searches: list[nn.Module] = []
    search = structure._search

    def counted(model: hf.PreTrainedModel) -> dict[StackName, str]:
        searches.append(model)
        return search(model)

    monkeypatch.setattr(structure, "_search", counted)
    assert find_stacks(model)[""] == first
    assert not searches
    blocks = model.bert.encoder.layer
    other = tiny_model("bert", "sequence-classification", num_layers=4, seed=9).bert.encoder.layer[1]
    blocks[1] = other  # of the same class, so that the list is where it was
    assert find_stacks(model)[""].blocks[1] is other
    assert not searches
    model.bert.encoder.layer = blocks[:3]
    model.config.num_hidden_layers = 3
    assert find_stacks(model)[""].depth == 3
    assert len(searches) == 1
    model.bert.encoder.blocks = model.bert.encoder.layer
    del model.bert.encoder.layer
    assert find_stacks(model)[""].block_path == "bert.encoder.blocks"
    model.config.num_hidden_layers = 7
    with pytest.raises(UserError, match="7 blocks of one class"):
        find_stacks(model)
