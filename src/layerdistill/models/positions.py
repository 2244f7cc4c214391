"""How long a text a model's position table allows, and which token ids a model cannot lose."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from layerdistill.models.trim_embeddings import token_ids_named

ROBERTA_POSITIONS = {
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mluke",
    "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Model types whose position table begins after the padding id."""


def positions(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model's position table holds, None for relative positions (-1 in XLNet's config).

    RoBERTa and its kin count positions from the padding id on, so two rows of their table are never used.
    """
    text: Any = config.get_text_config()
    rows = getattr(text, "max_position_embeddings", None)
    if rows is None or rows <= 0:
        return None
    if text.model_type in ROBERTA_POSITIONS:
        return rows - text.pad_token_id - 1
    return rows


def fewest_positions(*configs: PretrainedConfig | None) -> int | None:
    """Return the fewest positions that any of the models has, None where none has a limit."""
    return min(
        (rows for config in configs if config is not None and (rows := positions(config)) is not None), default=None
    )


def ids_to_stay(config: PretrainedConfig) -> set[int]:
    """Return the token ids that a model cannot lose: those that its configuration names, and those of its positions.

    RoBERTa and its kin find a token's position by the padding id, which must stay what it is.
    """
    named = token_ids_named(config)
    if config.model_type in ROBERTA_POSITIONS and config.pad_token_id is not None:
        named |= set(range(config.pad_token_id + 1))
    return named
