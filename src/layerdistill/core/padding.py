"""The token id that a model takes for padding, by which decoders that classify find the last token of a text."""

from __future__ import annotations

from transformers import PretrainedConfig

POOLED = ("sequence-classification", "multi-label-classification", "regression")
"""Tasks in which a decoder answers at the last token that is not padding."""


def padding_token(config: PretrainedConfig) -> int | None:
    """Return `config.pad_token_id`, None where there is none or it is no row of the embedding (-1)."""
    token = getattr(config, "pad_token_id", None)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return token if isinstance(token, int) and token >= 0 and (rows is None or token < rows) else None


def padding_problems(teacher: PretrainedConfig, student: PretrainedConfig, task: str) -> list[str]:
    """Return why no batch can be filled up for both models."""
    theirs, ours = padding_token(teacher), padding_token(student)
    if task not in POOLED or theirs is None or ours is None or theirs == ours:
        return []
    return [
        f"config.pad_token_id is {theirs} in the teacher and {ours} in the student, but one batch is filled up for "
        "both, and decoders find the end of a text by it. Write the teacher's into the student's config.json."
    ]
