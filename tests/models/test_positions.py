"""How many tokens a model's position table really holds: one more is too many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from layerdistill.core.errors import UserError
from layerdistill.evaluate import EvaluationConfig, measure_cost
from layerdistill.models import fewest_positions, positions

TABLE = 40
SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50,
    "max_position_embeddings": TABLE, "pad_token_id": 1,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "bert": hf.BertConfig,
    "roberta": hf.RobertaConfig,
    "roberta-prelayernorm": hf.RobertaPreLayerNormConfig,
    "xlm-roberta": hf.XLMRobertaConfig,
    "xlm-roberta-xl": hf.XLMRobertaXLConfig,
    "camembert": hf.CamembertConfig,
    "data2vec-text": hf.Data2VecTextConfig,
    "mpnet": hf.MPNetConfig,
    "xmod": hf.XmodConfig,
    "ibert": hf.IBertConfig,
    "luke": hf.LukeConfig,
    "layoutlmv3": hf.LayoutLMv3Config,
    "lilt": hf.LiltConfig,
    "markuplm": hf.MarkupLMConfig,
}
OWN = {
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16}, "xmod": {"default_language": "en_XX"},
    "layoutlmv3": {"coordinate_size": 2, "shape_size": 4, "visual_embed": False},
    "lilt": {"hidden_size": 24, "channel_shrink_ratio": 2, "max_2d_position_embeddings": 64},
    "markuplm": {"max_depth": 4, "xpath_unit_hidden_size": 4, "max_xpath_tag_unit_embeddings": 300},
}  # fmt: skip


def model_of(kind: str) -> hf.PreTrainedModel:
    return hf.AutoModel.from_config(MODELS[kind](**{**SHAPE, **OWN.get(kind, {})})).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_that_many_tokens_and_no_more(kind: str) -> None:
    model = model_of(kind)
    held = positions(model.config)
    assert held == (TABLE if kind == "bert" else TABLE - 2)
    with torch.no_grad():
        model(input_ids=torch.full((1, held), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, held + 1), 5))


def test_minus_one_is_no_limit() -> None:
    config = hf.XLNetConfig()
    assert config.max_position_embeddings == -1
    assert positions(config) is None
    assert fewest_positions(config, model_of("bert").config) == TABLE


def test_cost_is_not_measured_beyond_them() -> None:
    model = model_of("roberta")
    section = EvaluationConfig(latency=False)
    assert measure_cost(model, TABLE - 2, section)["seq"] == TABLE - 2
    with pytest.raises(UserError, match=f"has {TABLE - 2} positions"):
        measure_cost(model, TABLE - 1, section)
