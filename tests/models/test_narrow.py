"""Heads and neurons that are removed: nothing else of the model changes, and it opens again."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from narrow_families import BLOCKS, FAMILIES, HEADS, NEURONS, SIZE, made, masked
from tiny_models import DECODERS, tiny_batch, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, dynamic_module_utils

from layerdistill.core.errors import UserError
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.models import count_parameters, load_student, modeling_narrow
from layerdistill.models.modeling_narrow import rebuild
from layerdistill.models.narrow import count_units, remove_units
from layerdistill.models.own_code import write_own_code

STOCK = {"phi", "qwen3"}
"""Families whose configuration can say 7 of 8 heads (or 3 of 4 groups) in a width of 32."""


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_narrowed_is_masked(family: str) -> None:
    model = made(family)
    whole = masked(model, family, HEADS, NEURONS)
    batch = tiny_batch(model, batch=4, seq=9)
    before = model(**batch).logits
    sizes = count_units(model)
    stock = remove_units(model, HEADS, NEURONS)
    expected, narrowed = whole(**batch).logits, model(**batch).logits
    assert (expected - before).abs().max() > 1e-3, "the test sees a difference"
    torch.testing.assert_close(narrowed, expected, atol=1e-12, rtol=1e-12)
    assert count_parameters(model)["total"] == sizes.parameters_without(1, 3) < sizes.parameters
    assert stock == (family in STOCK)
    assert hasattr(model.config, "layerdistill") != stock


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rebuilt_model_takes_the_weights(family: str) -> None:
    model = made(family)
    remove_units(model, HEADS, NEURONS)
    config = type(model.config).from_dict(json.loads(json.dumps(model.config.to_dict())))
    again = type(made(family))(config).double().eval()
    if family not in STOCK:
        with pytest.raises(RuntimeError, match="size mismatch"):
            again.load_state_dict(model.state_dict())
        rebuild(again, config.layerdistill)
    again.load_state_dict(model.state_dict())
    batch = tiny_batch(model)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", sorted(STOCK))
def test_a_stock_student_opens_with_plain_transformers(family: str, tmp_path: Path) -> None:
    model = made(family)
    assert remove_units(model, HEADS, NEURONS)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    batch = tiny_batch(model)
    with torch.no_grad():
        assert torch.equal(again.double().eval()(**batch).logits, model(**batch).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in STOCK])
def test_a_student_with_its_modelling_file_opens_with_the_same_logits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = made(family).float()
    remove_units(model, HEADS, NEURONS)
    model.save_pretrained(tmp_path / "student")
    write_own_code(model, tmp_path / "student")
    auto = AutoModelForCausalLM if family in DECODERS else AutoModelForSequenceClassification
    batch = tiny_batch(model)
    ours = load_student(tmp_path / "student")
    theirs = auto.from_pretrained(tmp_path / "student", trust_remote_code=True).eval()
    assert type(theirs).__module__.startswith("transformers_modules."), "it opened by the file beside it"
    assert torch.equal(ours(**batch).logits, model(**batch).logits)
    assert torch.equal(theirs(**batch).logits, model(**batch).logits)


@torch.no_grad()
@pytest.mark.parametrize(("family", "stock"), [("gpt2", False), ("llama", True)])
def test_a_narrow_student_can_be_narrowed_again(family: str, stock: bool, tmp_path: Path) -> None:
    model = made(family).float()
    assert not remove_units(model, HEADS, NEURONS)
    model.save_pretrained(tmp_path / "once")
    write_own_code(model, tmp_path / "once")
    opened = load_student(tmp_path / "once")
    whole = masked(opened, family, [[0]] * BLOCKS, [[0, 1]] * BLOCKS)
    assert remove_units(opened, [[0]] * BLOCKS, [[0, 1]] * BLOCKS) == stock, "4 heads divide Llama's width again"
    opened.save_pretrained(tmp_path / "twice")
    write_own_code(opened, tmp_path / "twice")
    again, batch = load_student(tmp_path / "twice"), tiny_batch(opened)
    assert torch.equal(again(**batch).logits, opened(**batch).logits)
    torch.testing.assert_close(opened(**batch).logits, whole(**batch).logits, atol=1e-5, rtol=1e-5)
    assert (type(again) is type(made(family))) == stock


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_neurons_only_are_stock_everywhere(family: str) -> None:
    model = made(family)
    assert remove_units(model, [[]] * BLOCKS, NEURONS)
    assert not hasattr(model.config, "layerdistill")
    again = type(model)(type(model.config).from_dict(model.config.to_dict()))
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


def test_llama_says_a_number_of_heads_that_divides_its_width() -> None:
    model = made("llama")
    assert remove_units(model, [[0, 2]] * BLOCKS, [[]] * BLOCKS)
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, SIZE)


def test_a_norm_that_phi_sizes_by_width_and_heads_is_no_stock_model() -> None:
    model, heads = made("phi", qk_layernorm=True), [[1, 4, 6], [0, 1, 2], [5, 6, 7]]
    whole = masked(model, "phi", heads, NEURONS)
    assert not remove_units(model, heads, NEURONS), "its class would make norms of 32 // 5 features"
    batch = tiny_batch(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, whole(**batch).logits, atol=1e-12, rtol=1e-12)


def test_heads_of_deberta_take_their_position_projections_along() -> None:
    model = made("deberta-v2", share_att_key=False)
    whole = masked(model, "deberta-v2", HEADS, NEURONS)
    units = count_units(model)
    remove_units(model, HEADS, NEURONS)
    assert count_parameters(model)["total"] == units.parameters_without(1, 3)
    batch = tiny_batch(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, whole(**batch).logits, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_the_cache_is_generation_without(family: str) -> None:
    model = made(family)
    remove_units(model, HEADS, NEURONS)
    ids = tiny_batch(model, batch=1, seq=5)["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    cached, slow = (
        model.generate(ids, use_cache=cache, output_logits=True, **settings)  # type: ignore[operator]
        for cache in (True, False)
    )
    assert torch.equal(cached.sequences, slow.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(slow.logits), atol=1e-9, rtol=1e-9)


# Refusals


@pytest.mark.parametrize(
    ("heads", "neurons"),
    [
        ([[1], [0, 1], [2]], [[]] * BLOCKS),
        ([[1]] * 2, [[]] * BLOCKS),
        ([[8]] * BLOCKS, [[]] * BLOCKS),
        ([list(range(8))] * BLOCKS, [[]] * BLOCKS),
        ([[]] * BLOCKS, [list(range(64))] * BLOCKS),
    ],
)
def test_lists_that_do_not_fit_are_refused(heads: list[list[int]], neurons: list[list[int]]) -> None:
    model = made("bert")
    before = fingerprint_model(model)
    with pytest.raises(UserError, match="give as many for every block"):
        remove_units(model, heads, neurons)
    assert fingerprint_model(model) == before


@pytest.mark.parametrize(
    ("family", "message"), [("bart", "an encoder and a decoder"), ("t5", "an encoder and a decoder")]
)
def test_an_encoder_decoder_is_refused(family: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        count_units(tiny_model(family, "seq2seq-lm"))


def test_tensors_that_belong_to_nobody_known_are_refused() -> None:
    model = made("llama")
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(8))  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match="holds sinks of which it is not known"):
        count_units(model)


def test_blocks_of_different_sizes_are_refused() -> None:
    model, other = made("gpt2"), made("gpt2")
    remove_units(other, [[0]] * BLOCKS, [[]] * BLOCKS)
    model.transformer.h[1] = other.transformer.h[1]  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match="differ in their heads or neurons"):
        count_units(model)


def test_a_description_that_does_not_fit_is_refused() -> None:
    for given in ((9, 9), (3, 2), (0, 0)):
        with pytest.raises(ValueError, match="does not fit blocks of 8 heads"):
            rebuild(made("bert"), {"kind": "narrow", "num_attention_heads": given[0], "num_key_value_heads": given[1]})


def test_the_modelling_file_stands_on_its_own() -> None:
    names = set()
    for node in ast.walk(ast.parse(Path(modeling_narrow.__file__).read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    assert names == {"__future__", "collections", "typing", "torch", "transformers"}
