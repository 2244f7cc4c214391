"""The works that are measured: their models and data, the same in every process because they come from seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

TEACHER_SEED, STUDENT_SEED, PROJECTION_SEED, DATA_SEED, ORDER_SEED = 1, 2, 3, 4, 5
FIRST_WORD = 3
"""Ids below are padding and specials; random texts have none of them."""

Hidden = Literal["mse", "cosine", "cka", "none"]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Depth and width of a model; every head is 32 wide."""

    blocks: int
    width: int


@dataclass(frozen=True)
class Work:
    """One distillation to measure: models, data, and the terms of the objective.

    The objective is the loss on the labels, `temperature` squared times the KL, and the mean over `pairs` of the hidden
    distance, each with weight 1. Layers are numbered as in `hidden_states`; in a language model the last one of both
    sides is taken after the final norm, which is what `output_hidden_states=True` gives.
    """

    name: str
    title: str
    family: Literal["bert", "gpt2"]
    hidden: Hidden
    teacher: Shape
    student: Shape
    pairs: tuple[tuple[int, int], ...]
    vocabulary: int
    batch_size: int
    longest: int
    mean_length: float
    deviation: float
    shortest: int
    padded_to: int | None = None
    temperature: float = 2.0
    learning_rate: float = 5e-4

    @property
    def task(self) -> str:
        """The task's name in layerdistill."""
        return "sequence-classification" if self.family == "bert" else "causal-lm"

    @property
    def words(self) -> str:
        """The work in a sentence."""
        terms = {
            "mse": f"{len(self.pairs)} projected hidden terms (MSE)",
            "cosine": f"{len(self.pairs)} projected hidden terms (1 - cosine)",
            "cka": f"{len(self.pairs)} hidden terms (1 - CKA over the batch's tokens)",
            "none": "no hidden terms",
        }[self.hidden]
        teacher, student = (f"{shape.blocks} x {shape.width}" for shape in (self.teacher, self.student))
        lengths = (
            f"{self.longest} tokens each"
            if self.deviation == 0
            else f"lengths from a normal({self.mean_length:g}, {self.deviation:g}) clipped to "
            f"{self.shortest}..{self.longest}"
        )
        padding = "dynamic padding" if self.padded_to is None else f"padded to {self.padded_to}"
        return (
            f"{self.family.upper().replace('GPT2', 'GPT-2')} {teacher} -> {student}, {self.vocabulary:,} tokens in the "
            f"vocabulary; CE + KL (temperature {self.temperature:g}) + {terms}; batches of {self.batch_size}, {lengths}"
            + ("" if self.deviation == 0 else f", {padding}")
            + f"; AdamW, learning rate {self.learning_rate:g}."
        )


W1 = Work(
    "W1", "projected hidden states", "bert", "mse", Shape(12, 384), Shape(4, 192),
    ((1, 3), (2, 6), (3, 9), (4, 12)), 30_522, 32, 128, 35.0, 15.0, 8,
)  # fmt: skip
W3 = Work(
    "W3", "a language model's vocabulary", "gpt2", "mse", Shape(8, 512), Shape(4, 256),
    ((1, 2), (2, 4), (3, 6), (4, 8)), 50_257, 8, 256, 256.0, 0.0, 256,
)  # fmt: skip
WORKS = {
    work.name: work
    for work in (
        W1,
        replace(W1, name="W1-padded", title="projected hidden states, padded to 128", padded_to=128),
        replace(W1, name="W2", title="CKA", hidden="cka"),
        W3,
        replace(W1, name="W4-kd", title="predictions only (a method of the study W4)", hidden="none"),
        replace(W1, name="W4-cosine", title="cosine (a method of the study W4)", hidden="cosine"),
    )
}


def tiny(work: Work) -> Work:
    """Return a work of the same form that takes milliseconds."""
    pairs = ((1, 2), (2, 4))
    small = replace(work, teacher=Shape(4, 64), student=Shape(2, 32), pairs=pairs, vocabulary=120, batch_size=4)
    lengths = (9.0, 4.0) if work.deviation else (16.0, 0.0)
    small = replace(small, longest=16, shortest=4, mean_length=lengths[0], deviation=lengths[1])
    return replace(small, padded_to=None if work.padded_to is None else 16)


def make_model(work: Work, shape: Shape, seed: int) -> Any:
    """Return a model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    heads = shape.width // 32
    if work.family == "bert":
        config = BertConfig(
            vocab_size=work.vocabulary, hidden_size=shape.width, num_hidden_layers=shape.blocks,
            num_attention_heads=heads, intermediate_size=4 * shape.width, num_labels=2,
        )  # fmt: skip
        return BertForSequenceClassification(config)
    config = GPT2Config(
        vocab_size=work.vocabulary, n_embd=shape.width, n_layer=shape.blocks, n_head=heads, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def make_teacher(work: Work) -> Any:
    """Return the teacher, frozen and in eval mode."""
    return make_model(work, work.teacher, TEACHER_SEED).eval().requires_grad_(False)


def make_student(work: Work) -> Any:
    """Return the student, in train mode."""
    return make_model(work, work.student, STUDENT_SEED).train()


def make_projections(work: Work) -> nn.ModuleList:
    """Return one linear map without bias for each pair, from the student's width to the teacher's."""
    torch.manual_seed(PROJECTION_SEED)
    number = len(work.pairs) if work.hidden in ("mse", "cosine") else 0
    return nn.ModuleList(nn.Linear(work.student.width, work.teacher.width, bias=False) for _ in range(number))


def make_examples(work: Work, batches: int) -> list[dict[str, Any]]:
    """Return random examples, `batches` batches of them; a shorter list is the beginning of a longer one."""
    draw = random.Random(DATA_SEED)
    examples: list[dict[str, Any]] = []
    for _ in range(batches * work.batch_size):
        length = min(max(round(draw.gauss(work.mean_length, work.deviation)), work.shortest), work.longest)
        ids = draw.choices(range(FIRST_WORD, work.vocabulary), k=length)
        examples.append({"input_ids": ids, "attention_mask": [1] * length})
        if work.family == "bert":
            examples[-1]["labels"] = draw.randrange(2)
    return examples


@dataclass
class Collate:
    """Makes a batch of examples, padded to its longest or to a fixed length, and counts what went through."""

    work: Work
    real: int = 0
    positions: int = 0

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Return `input_ids`, `attention_mask` `(batch, seq)` and `labels`."""
        length = self.work.padded_to or max(len(example["input_ids"]) for example in examples)
        ids = torch.zeros(len(examples), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            found = len(example["input_ids"])
            ids[row, :found] = torch.as_tensor(example["input_ids"])
            mask[row, :found] = 1
            self.real += found
        self.positions += ids.numel()
        if self.work.family == "bert":
            labels = torch.tensor([int(example["labels"]) for example in examples])
        else:
            labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make_loader(work: Work, examples: Sequence[Any], collate: Callable[[Sequence[Any]], Batch]) -> DataLoader:
    """Return a loader that shuffles, as a loop written by hand has it."""
    order = torch.Generator().manual_seed(ORDER_SEED)
    return DataLoader(examples, work.batch_size, shuffle=True, generator=order, collate_fn=collate)  # type: ignore[arg-type]


def endless(loader: DataLoader, device: str) -> Iterator[Batch]:
    """Yield batches on `device`, pass after pass."""
    while True:
        for batch in loader:
            yield {name: tensor.to(device) for name, tensor in batch.items()}


def module_pairs(work: Work) -> list[tuple[str, str]]:
    """Return the matched modules' dotted paths, for tools that hook modules instead of reading `hidden_states`."""
    if work.family == "bert":
        return [(f"bert.encoder.layer.{s - 1}", f"bert.encoder.layer.{t - 1}") for s, t in work.pairs]
    inner = [(f"transformer.h.{s - 1}", f"transformer.h.{t - 1}") for s, t in work.pairs[:-1]]
    return [*inner, ("transformer.ln_f", "transformer.ln_f")]


def head_path(work: Work) -> str:
    """Return the dotted path of the module that gives the logits."""
    return "classifier" if work.family == "bert" else "lm_head"
