"""Tiny random models and the rows that the evaluator's tests feed them."""

from __future__ import annotations

import random
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    PreTrainedModel,
    T5Config,
)

VOCAB = 97
PAD = 0


def bert(num_labels: int = 2, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64} | changes
    config = BertConfig(
        vocab_size=VOCAB,
        max_position_embeddings=64,
        pad_token_id=PAD,
        num_labels=num_labels,
        initializer_range=0.1,
        **shape,
    )
    return AutoModelForSequenceClassification.from_config(config)


def gpt2(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    shape = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | changes
    config = GPT2Config(bos_token_id=1, eos_token_id=1, pad_token_id=PAD, initializer_range=0.1, **shape)
    return AutoModelForCausalLM.from_config(config)


def t5() -> PreTrainedModel:
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return AutoModelForSeq2SeqLM.from_config(config)


def rows(labels: list[Any] | None, count: int = 23, longest: int = 30, seed: int = 3) -> Dataset:
    """Rows of differing length, in no order of length; causal-lm rows (labels None) predict their own tokens."""
    draw = random.Random(seed)
    ids = [[draw.randrange(2, VOCAB) for _ in range(draw.randint(2, longest))] for _ in range(count)]
    return Dataset.from_dict(
        {
            "example_id": [f"row-{7 * n % count}" for n in range(count)],
            "input_ids": ids,
            "attention_mask": [[1] * len(one) for one in ids],
            "labels": ids if labels is None else labels,
        }
    )


def collate(examples: list[dict[str, Any]], extra: int = 0) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest example and `extra` tokens more; token labels get -100."""
    width = max(len(example["input_ids"]) for example in examples) + extra

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([example[name] + [value] * (width - len(example[name])) for example in examples])

    batch = {"input_ids": padded("input_ids", PAD), "attention_mask": padded("attention_mask", 0)}
    first = examples[0]["labels"]
    if isinstance(first, list) and len(first) == len(examples[0]["input_ids"]):
        batch["labels"] = padded("labels", -100)
    else:
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
    return batch
