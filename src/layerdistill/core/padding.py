"""The token id that a model takes for padding, by which decoders that classify find the last token of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

POOLED = ("sequence-classification", "multi-label-classification", "regression")
"""Tasks in which a decoder answers at the last token that is not padding."""


def padding_token(config: PretrainedConfig) -> int | None:
    """Return the configuration's `pad_token_id`, None where there is none or it is no row of the embedding (-1)."""
    text: Any = config.get_text_config()
    token = getattr(text, "pad_token_id", None)
    return token if isinstance(token, int) and 0 <= token < text.vocab_size else None


def set_padding(config: PretrainedConfig, token: int) -> None:
    """Write what batches are filled up with into a configuration that knows no padding, if it is a row there."""
    text: Any = config.get_text_config()
    if padding_token(config) is None and token < text.vocab_size:
        text.pad_token_id = config.pad_token_id = token


def ends_at_padding(config: PretrainedConfig, task: str) -> bool:
    """Whether a model finds the end of a text by its padding; encoders answer at the first token, or at all of them."""
    kind = config.model_type
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_encoder_decoder
    return task in POOLED and not encoder and (kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shared_padding(configs: Sequence[PretrainedConfig], task: str) -> int | None:
    """Return the token that fills up batches for models of one vocabulary, None where none of them knows one.

    It is that of the first model that finds the end of a text by it, else of the first that has one.
    """
    rows = min(config.get_text_config().vocab_size for config in configs)
    ordered = sorted(configs, key=lambda config: not ends_at_padding(config, task))
    known = [token for config in ordered if (token := padding_token(config)) is not None and token < rows]
    return known[0] if known else None


def padding_problems(configs: Sequence[PretrainedConfig], task: str) -> list[str]:
    """Return why no batch can be filled up for all of these models, a teacher and a student (or one of them)."""
    tokens = [padding_token(config) for config in configs if ends_at_padding(config, task)]
    needed = list(dict.fromkeys(token for token in tokens if token is not None))
    if len(needed) < 2:
        return []
    return [
        f"pad_token_id is {needed[0]} in the teacher's configuration and {needed[1]} in the student's, but one batch "
        "is filled up for both, and both find the end of a text by it. Save the student with the teacher's, in its "
        "config.json."
    ]
