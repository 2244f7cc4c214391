"""A trimmed model says of renumbered ids what the whole one says, and plain transformers opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CLASSES, FITTING, tiny_model
from transformers import GenerationConfig

from layerdistill.core.errors import UserError
from layerdistill.models import find_embeddings, find_head, ids_to_stay, make_student, trim_config, trim_model
from layerdistill.train.trainer import save_student

KEPT = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 60)
IDS = torch.tensor([[1, 7, 4, 9, 2], [1, 10, 6, 5, 2]])
"""New ids; the end of the text is last, as BART's classifier wants it."""

CASES = [(head, family) for head in ("sequence-classification", "causal-lm") for family in FITTING[head]]


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize(("head", "family"), CASES)
def test_it_says_what_the_whole_model_says(head: str, family: str, tmp_path: Path) -> None:
    whole = tiny_model(family, head)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    trimmed = trim_model(whole, KEPT)
    expected = logits(whole, torch.tensor(KEPT)[IDS])
    expected = expected[..., list(KEPT)] if head == "causal-lm" else expected
    torch.testing.assert_close(logits(trimmed, IDS), expected, rtol=1e-5, atol=1e-6)
    assert trimmed.config.vocab_size == find_embeddings(trimmed).num_embeddings == len(KEPT)
    assert torch.equal(find_embeddings(trimmed).weight, find_embeddings(whole).weight[list(KEPT)])
    save_student(trimmed, tmp_path)
    opened, info = CLASSES[head].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert torch.equal(logits(opened.eval(), IDS), logits(trimmed, IDS))
    assert {name: tensor.shape for name, tensor in whole.state_dict().items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_stay_tied_and_others_have_rows_of_their_own(family: str, tied: bool) -> None:
    whole = tiny_model(family, "causal-lm", tie_word_embeddings=tied)
    trimmed = trim_model(whole, KEPT)
    embedding, head = find_embeddings(trimmed).weight, find_head(trimmed)
    assert (embedding is head.weight) is tied
    assert torch.equal(head.weight, find_head(whole).weight[list(KEPT)])
    if family == "phi":
        assert torch.equal(head.bias, find_head(whole).bias[list(KEPT)])


def test_a_student_cut_out_of_it_is_trimmed_too() -> None:
    whole = tiny_model("gpt2", "causal-lm")
    student = make_student(trim_model(whole, KEPT), num_blocks=2, hidden_size=16, init="truncate")
    other = make_student(whole, num_blocks=2, hidden_size=16, init="truncate")
    assert student.config.vocab_size == len(KEPT)
    expected = logits(other, torch.tensor(KEPT)[IDS])[..., list(KEPT)]
    torch.testing.assert_close(logits(student, IDS), expected, rtol=1e-5, atol=1e-6)


def test_ids_in_the_configurations_are_renumbered() -> None:
    ids = {"pad_token_id": 34, "bos_token_id": 5, "eos_token_id": [8, 40], "sep_token_id": 7}
    whole = tiny_model("llama", "causal-lm", **ids)
    whole.generation_config = GenerationConfig(
        pad_token_id=34, eos_token_id=[8, 40], bos_token_id=5, suppress_tokens=[7, 21], bad_words_ids=[[7, 21], [21]],
        sequence_bias=[[[21], -10.0], [[7, 21], 2.0], [[5, 21], 3.0]], forced_decoder_ids=[[1, 5], [2, 7]],
        force_words_ids=[[5], [[7], [21]], [7]],
    )  # fmt: skip
    trimmed = trim_model(whole, KEPT)
    found = trimmed.config
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (8, 4, [5])
    assert found.sep_token_id is None, "it is not kept"
    assert find_embeddings(trimmed).padding_idx == 8
    made = trimmed.generation_config
    assert (made.pad_token_id, made.eos_token_id, made.bos_token_id) == (8, [5], 4)
    assert made.suppress_tokens == [7]
    assert made.bad_words_ids == [[7]]
    assert made.sequence_bias == [[[7], -10.0], [[4, 7], 3.0]]
    assert made.forced_decoder_ids == [[1, 4]]
    assert made.force_words_ids == [[4], [[7]]]
    assert whole.config.pad_token_id == whole.generation_config.pad_token_id == 34, "the whole one is left alone"
    assert trim_config(whole.config, KEPT).to_dict() == found.to_dict()
    assert ids_to_stay(whole.config) == {34, 5, 8, 40, 7}


def test_roberta_keeps_all_ids_up_to_its_padding() -> None:
    whole = tiny_model("roberta", "sequence-classification", pad_token_id=6)
    assert ids_to_stay(whole.config) == set(range(7)), "1 and 2, the begin and end of texts, are among them"
    with pytest.raises(UserError, match="RobertaForSequenceClassification does more with token ids"):
        trim_model(whole, [0, 1, 2, 6, *range(20, 40)])
    trimmed = trim_model(whole, [*range(7), *range(20, 40)])
    assert torch.equal(logits(trimmed, IDS + 10), logits(whole, IDS + 23))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_attention_mode_and_frozen_weights_stay(dtype: torch.dtype) -> None:
    whole = tiny_model("llama", "causal-lm").to(dtype).train()
    whole.set_attn_implementation("eager")
    whole.model.layers[1].requires_grad_(False)
    trimmed = trim_model(whole, KEPT)
    assert {parameter.dtype for parameter in trimmed.parameters()} == {dtype}
    assert trimmed.config._attn_implementation == "eager"
    assert trimmed.training
    assert whole.training
    expected = {name for name, parameter in whole.named_parameters() if not parameter.requires_grad}
    assert expected == {name for name, parameter in trimmed.named_parameters() if not parameter.requires_grad}
    shared = [name for name, tensor in trimmed.state_dict().items()
              if tensor.data_ptr() == whole.state_dict()[name].data_ptr()]  # fmt: skip
    assert set(trimmed.state_dict()) - set(shared) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_no_random_number_is_drawn() -> None:
    whole = tiny_model("bert", "sequence-classification")
    state = torch.get_rng_state()
    trim_model(whole, KEPT)
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_that_its_class_would_not_make_again_is_refused() -> None:
    whole = tiny_model("bert", "sequence-classification")
    whole.register_buffer("extra", torch.zeros(1))
    with pytest.raises(UserError, match=r"not what its class makes of its configuration \(extra is in one"):
        trim_model(whole, KEPT)
