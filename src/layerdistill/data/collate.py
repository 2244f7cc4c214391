"""Examples into a batch: dynamic padding, masks, and labels of the right kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from layerdistill.core.errors import UserError
from layerdistill.core.padding import fewest_rows, shared_padding
from layerdistill.core.types import IGNORED_LABEL
from layerdistill.data.tasks import get_task
from layerdistill.data.tokenizer import padding_id


@dataclass(frozen=True)
class Collator:
    """Make a batch of examples that `tokenise` made, or that a user tokenised.

    Padding is on the right whatever the tokenizer prefers (that is for generation): with absolute positions, left
    padding would shift every text. A tokenizer without a pad token (GPT-2) pads with its end-of-text token; the mask is
    0 there and the label -100, while real end-of-text tokens stay attended and labelled. The padded length is rounded
    up to `pad_to_multiple_of`, but never above `max_length`.
    """

    tokenizer: PreTrainedTokenizerBase
    task: str
    padding: Literal["longest", "max_length"] = "longest"
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    padding_token: int | None = None
    """The id that fills up, see `filler_for`; None for the tokenizer's, see `padding_id`."""

    def __post_init__(self) -> None:
        get_task(self.task)
        if self.padding == "max_length" and self.max_length is None:
            raise UserError("padding to 'max_length' needs max_length. Give it, or pad to 'longest'.")

    @property
    def filler(self) -> int:
        """The id that fills up."""
        return padding_id(self.tokenizer) if self.padding_token is None else self.padding_token

    @property
    def unusual(self) -> bool:
        """Whether another id fills up than the tokenizer by itself would have."""
        return self.filler != padding_id(self.tokenizer)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and (if there) `token_type_ids`, int64 `(batch, seq)`, and `labels`.

        `labels` is int64 `(batch,)` for classes, float32 `(batch, classes)` for several classes, float32 `(batch,)` for
        numbers and int64 `(batch, seq)` for language models (`input_ids` where an example brings none); it is left out
        where examples of other tasks have none. Every other column, `example_id` among them, is dropped.
        """
        ids = [torch.as_tensor(example["input_ids"], dtype=torch.long) for example in examples]
        length = self._padded_length(max(len(row) for row in ids))
        masks = [
            example.get("attention_mask", torch.ones_like(row)) for example, row in zip(examples, ids, strict=True)
        ]
        batch = {
            "input_ids": _padded(ids, length, self.filler),
            "attention_mask": _padded(masks, length, 0),
        }
        if "token_type_ids" in examples[0]:
            rows = [example["token_type_ids"] for example in examples]
            batch["token_type_ids"] = _padded(rows, length, self.tokenizer.pad_token_type_id)
        kind = get_task(self.task).label_kind
        if kind == "tokens":
            batch["labels"] = _padded(
                [example.get("labels", example["input_ids"]) for example in examples], length, IGNORED_LABEL
            )
        elif name := next((name for name in ("labels", "label") if name in examples[0]), None):
            dtype = torch.long if kind == "class" else torch.float32
            batch["labels"] = torch.stack([torch.as_tensor(example[name], dtype=dtype) for example in examples])
        return batch

    def _padded_length(self, longest: int) -> int:
        length = longest if self.padding == "longest" or self.max_length is None else max(longest, self.max_length)
        if self.pad_to_multiple_of is None:
            return length
        rounded = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return rounded if self.max_length is None else max(length, min(rounded, self.max_length))


def filler_for(tokenizer: PreTrainedTokenizerBase, models: Sequence[PretrainedConfig], task: str) -> int:
    """Return the id that fills up batches for these models: what they know as padding, else the tokenizer's."""
    shared = shared_padding(models, task)
    return padding_id(tokenizer, fewest_rows(models)) if shared is None else shared


def _padded(rows: Sequence[Any], length: int, fill: int) -> Tensor:
    padded = torch.full((len(rows), length), fill, dtype=torch.long)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = torch.as_tensor(row, dtype=torch.long)
    return padded
