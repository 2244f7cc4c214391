"""Recipes of published settings: what is compared differs in nothing else, and the objective is the published one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as hf
import yaml
from torch import nn

from layerdistill.core.types import Pair, Progress
from layerdistill.methods.rail_kd import METHOD as RAIL_KD
from layerdistill.methods.rail_kd import RailKdConfig
from layerdistill.methods.table import METHODS
from layerdistill.models import count_parameters, empty_model, shrink_config
from layerdistill.prepare import shape_of
from layerdistill.recipe import RecipeLoader, load_recipe

PAPERS = Path(__file__).resolve().parents[2] / "recipes" / "papers"
CKA = "cka_bert_6x384"


def sections(name: str, *left_out: str) -> dict[str, Any]:
    return load_recipe(PAPERS / f"{name}.yaml").model_dump(exclude={"output", *left_out})


def bert_pair(teacher: int = 12, student: int = 6, width: int = 384) -> Pair:
    return Pair(
        None, nn.Identity(), "sequence-classification", {"": teacher}, {"": student}, {"": 768}, {"": width}, None, 42
    )


def terms(name: str, pair: Pair) -> dict[str, Any]:
    config = load_recipe(PAPERS / f"{name}.yaml").method
    return {term.name: term for term in next(METHODS[config.name].stages(pair, config)).terms}


@pytest.mark.parametrize("baseline", ["cka_bert_6x384_kd", "cka_bert_6x384_linear", "cka_bert_6x768_cosine"])
def test_the_baselines_of_cka_differ_in_the_method_alone(baseline: str) -> None:
    assert sections(baseline, "method", "student") == sections(CKA, "method", "student")
    ours, theirs = sections(baseline)["student"], sections(CKA)["student"]
    if baseline.endswith("cosine"):
        assert ours.pop("hidden_size") == 768
        assert theirs.pop("hidden_size") == 384
    assert ours == theirs
    method, published = sections(baseline)["method"], sections(CKA)["method"]
    for key in ("temperature", "layer_map", "embeddings", "reduce", "weights"):
        if key in method and baseline != "cka_bert_6x384_kd":
            assert method[key] == published[key], key
    assert method["temperature"] == 1.0


def test_cka_is_one_loss_of_weight_one_for_each_of_seven_layers() -> None:
    for name, pair in ((CKA, bert_pair()), ("cka_bert_6x384_linear", bert_pair())):
        hidden = terms(name, pair)["hidden"]
        matched = [(str(student), str(teacher)) for student, (teacher,) in hidden.groups(Progress())]
        assert matched == [(str(layer), str(2 * layer)) for layer in range(7)]
        assert hidden.coefficient("hidden/1-2", Progress()) == 1.0
    shared = terms("cka_bert_6x384_linear", bert_pair())["hidden"]
    assert sum(parameter.numel() for parameter in shared.parameters()) == 384 * 768 + 768
    assert list(terms("cka_bert_6x768_cosine", bert_pair(width=768))["hidden"].parameters()) == []
    assert set(terms("cka_bert_6x384_kd", bert_pair())) == {"task", "logits"}


def test_the_maps_of_cka_are_forward_at_the_published_depths_and_the_start_is_another() -> None:
    """8 blocks: s_{2i+1} <- t_{3i+2}, s_{2i+2} <- t_{3i+3}; 6: s_i <- t_2i, started from blocks 2j."""
    eight = terms(CKA, bert_pair(student=8))["hidden"].maps[0]
    expected = [(0, 0)] + [pair for i in range(4) for pair in ((2 * i + 1, 3 * i + 2), (2 * i + 2, 3 * i + 3))]
    assert eight.pairs == expected
    shape = shape_of(load_recipe(PAPERS / f"{CKA}.yaml"))
    config = shrink_config(hf.BertConfig(), **shape)
    assert (config.num_attention_heads, config.intermediate_size) == (6, 1536)
    assert round(count_parameters(empty_model(config))["total"] / 1e6, 1) == 22.7
    assert shape["copy_map"] == "skip"


def test_the_two_starts_of_layer_selection_differ_in_the_start_alone() -> None:
    copied, random = (sections(f"layer_selection_bert_{init}") for init in ("copy", "random"))
    assert (copied["student"].pop("init"), random["student"].pop("init")) == ("copy", "random")
    assert copied == random
    hidden = terms("layer_selection_bert_copy", bert_pair(student=3, width=768))["hidden"]
    assert hidden.maps[0].pairs == [(0, 0), (1, 4), (2, 8), (3, 12)]
    assert hidden.coefficient("hidden/1-4", Progress()) == 3 * 768 / 32 / 4


@pytest.mark.parametrize("strategy", ["forward", "reverse", "all_to_one", "random"])
@pytest.mark.parametrize("name", ["layer_selection_bert_copy", "layer_selection_bert_random", "layer_selection_qwen3"])
def test_every_strategy_is_one_override(name: str, strategy: str) -> None:
    recipe = load_recipe(PAPERS / f"{name}.yaml", [f"method.layer_map={strategy}"])
    assert recipe.method.layer_map == strategy
    bare = load_recipe(PAPERS / f"{name}.yaml", ["method={name: kd, temperature: 1.0}"])
    assert bare.method.weights.logits == 1.0


def test_qwen3_copies_and_matches_as_published() -> None:
    recipe = load_recipe(PAPERS / "layer_selection_qwen3.yaml")
    assert recipe.student is not None
    assert recipe.student.copy_map == [0, 4, 9, 13, 18, 22, 27, 31, 35]
    pair = Pair(None, nn.Identity(), "causal-lm", {"": 36}, {"": 9}, {"": 4096}, {"": 4096}, 100, 42)
    hidden = terms("layer_selection_qwen3", pair)["hidden"]
    assert [target - 1 for _, target in hidden.maps[0].pairs] == [3, 7, 11, 15, 19, 23, 27, 31, 35]
    assert hidden.coefficient("hidden/1-4", Progress()) == pytest.approx(3 / 9)


def test_rail_kd_is_what_the_authors_of_loraild_ran() -> None:
    text = (PAPERS / "rail_kd_roberta.yaml").read_text()
    config = RailKdConfig.model_validate(yaml.load(text, Loader=RecipeLoader)["method"])  # noqa: S506 - a SafeLoader
    assert config == RailKdConfig(squared=False, include_padding=True)
    pair = Pair(None, nn.Identity(), "sequence-classification", {"": 24}, {"": 6}, {"": 1024}, {"": 768}, None, 1)
    (preview,) = RAIL_KD.preview(pair, config)
    assert preview.thrown_away == 934_848
