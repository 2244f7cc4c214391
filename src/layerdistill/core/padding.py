"""The token id that a model takes for padding, by which decoders that classify find the last token of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

POOLED = ("sequence-classification", "multi-label-classification", "regression")
"""Tasks in which a decoder answers at the last token that is not padding."""

OTHER_READERS = ("mistral4", "t5gemma", "t5gemma2")
"""Model types that find the end of a text by its padding, though they are not in the list of causal language models."""

OTHER_ENDS = ("xlnet",)
"""Model types in that list that answer at the last position whatever is there."""


def padding_token(config: PretrainedConfig) -> int | None:
    """Return the configuration's `pad_token_id`, None where there is none or it is no row of the embedding (-1)."""
    text: Any = config.get_text_config()
    token = getattr(text, "pad_token_id", None)
    return token if isinstance(token, int) and 0 <= token < text.vocab_size else None


def set_padding(config: PretrainedConfig, task: str, token: int) -> None:
    """Write what batches are filled up with into a configuration that needs padding and knows none, if it is a row.

    Decoders that classify need it, and encoder-decoders, whose decoder begins with it. Others do not get it: an
    embedding's row of padding is never trained, and the end of text is what often fills up.
    """
    text: Any = config.get_text_config()
    needed = ends_at_padding(config, task) or config.is_encoder_decoder
    if needed and padding_token(config) is None and token < text.vocab_size:
        text.pad_token_id = config.pad_token_id = token


def ends_at_padding(config: PretrainedConfig, task: str) -> bool:
    """Whether a model finds the end of a text by its padding; encoders answer at the first token, or at all of them.

    Of a model with code of its own it is assumed.
    """
    kind = config.model_type
    if task not in POOLED or kind in OTHER_ENDS:
        return False
    if kind in OTHER_READERS or kind not in CONFIG_MAPPING_NAMES:
        return True
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_encoder_decoder
    return not encoder and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def fewest_rows(configs: Sequence[PretrainedConfig]) -> int:
    """Return how many token ids all of these models have a row for."""
    return min(config.get_text_config().vocab_size for config in configs)


def shared_padding(configs: Sequence[PretrainedConfig], task: str) -> int | None:
    """Return the token that fills up batches for models of one vocabulary, None where none of them knows one.

    It is that of the first model that finds the end of a text by it, else of the first that has one.
    """
    rows = fewest_rows(configs)
    ordered = sorted(configs, key=lambda config: not ends_at_padding(config, task))
    known = [token for config in ordered if (token := padding_token(config)) is not None and token < rows]
    return known[0] if known else None


def padding_problems(configs: Sequence[PretrainedConfig], task: str) -> list[str]:
    """Return why no batch can be filled up for both of these models, a teacher and a student (none for one alone)."""
    if len(configs) < 2:
        return []
    tokens = [padding_token(config) if ends_at_padding(config, task) else None for config in configs]
    needed = list(dict.fromkeys(token for token in tokens if token is not None))
    if len(needed) > 1:
        return [
            f"pad_token_id is {needed[0]} in the teacher's configuration and {needed[1]} in the student's, but one "
            "batch is filled up for both, and both find the end of a text by it. Save the student with the teacher's, "
            "in its config.json."
        ]
    rows = fewest_rows(configs)
    return [
        f"pad_token_id is {token} in the configuration of the {whose}, which finds the end of a text by it, but the "
        f"other model has embeddings for {rows} token ids only, and one batch is filled up for both. Save both with "
        f"one below {rows}, in their config.json."
        for whose, token in zip(("teacher", "student"), tokens, strict=True)
        if token is not None and token >= rows
    ]


def unusual_padding(config: PretrainedConfig, task: str, collator: Any) -> int | None:
    """Return what fills up batches, where it is not the tokenizer's and the model's answers depend on it; else None."""
    return collator.filler if getattr(collator, "unusual", False) and ends_at_padding(config, task) else None
