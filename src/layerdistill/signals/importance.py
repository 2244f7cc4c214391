"""How important each block of a model is: criteria that need labels, predictions, or hidden states only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.core.types import IGNORED_LABEL, Batch, Mean, Signal, Tap
from layerdistill.matching import (
    CkaStatistics,
    binary_kl,
    cka_from_statistics,
    cka_statistics,
    forward_kl,
    logit_mse,
    next_token_labels,
)
from layerdistill.matching.importance import angular_distance, block_influence
from layerdistill.matching.task_loss import task_loss
from layerdistill.models import Stack, evaluating, find_stacks
from layerdistill.signals.skip import skipped
from layerdistill.signals.source import run_model

Criterion = Callable[[nn.Module, str, Sequence[Batch]], list[float]]
"""A function of a model with one stack of blocks, the task and batches; returns one number per block, higher = more
important."""


def one_out_loss(model: nn.Module, task: str, batches: Sequence[Batch]) -> list[float]:
    """Return by how much the loss on the labels rises without each block (negative where it falls).

    One forward pass per block and batch, and one with all blocks; the loss is averaged over all labels. Source: the
    one-out ranking of Kovalev and Tikhomirov (https://arxiv.org/abs/2511.05085), with the loss on held-out rows in the
    place of their score on seven tasks. Raises UserError for a model with an encoder and a decoder.
    """
    stack = only_stack(model)

    def mean_loss(without: list[int]) -> float:
        total = count = 0.0
        with skipped(model, without):
            for batch in batches:
                loss = task_loss(task, _logits(model, batch), batch)
                total, count = total + float(loss.total), count + float(loss.count)
        return total / max(count, 1.0)

    with quiet(model, batches):
        whole = mean_loss([])
        return [mean_loss([block]) - whole for block in range(stack.depth)]


def one_out_kl(
    model: nn.Module, task: str, batches: Sequence[Batch], reference: nn.Module | None = None
) -> list[float]:
    """Return by how much the predictions' divergence from the reference rises without each block.

    The reference is the whole model itself (whose own divergence is 0), or the model given, such as the original
    teacher. The divergence is KL(reference || model) at temperature 1, averaged over labelled positions (causal-lm) or
    examples; binary KL for multi-label classification, squared difference for regression. Forward passes and source as
    for `one_out_loss`. Raises UserError for a model with an encoder and a decoder.
    """
    stack = only_stack(model)
    totals, count = [0.0] * (stack.depth + 1), 0.0
    with quiet(model, batches), quiet(reference or model, batches):
        for batch in batches:
            whole = _logits(model, batch)
            wanted = whole if reference is None else _logits(reference, batch)
            gone = _divergence(task, whole, wanted, batch)
            count += float(gone.count)
            totals[-1] += float(gone.total)
            for block in range(stack.depth):
                with skipped(model, [block]):
                    totals[block] += float(_divergence(task, _logits(model, batch), wanted, batch).total)
    return [(total - totals[-1]) / max(count, 1.0) for total in totals[:-1]]


def cka_redundancy(model: nn.Module, task: str, batches: Sequence[Batch]) -> list[float]:
    """Return `1 - CKA` of each block's input and output, over all real tokens of all batches together.

    Linear, biased CKA (see `matching.linear_cka`), exact over batches; one forward pass. Holds three float64 matrices
    of hidden x hidden per block. Raises UserError for a model with an encoder and a decoder, and where a block's input
    or output is the same for all tokens.
    """
    sums: list[CkaStatistics] = []
    for batch_number, (signal, stack) in enumerate(_flows(model, batches)):
        mask = signal.masks[stack.name]
        for block, (entering, leaving) in enumerate(_sides(signal, stack)):
            kept = mask.bool()
            x, y = entering[kept].double(), leaving[kept].double()
            if batch_number == 0:
                sums.append(cka_statistics(x, y, shift_x=x.mean(0), shift_y=y.mean(0)))
            else:
                sums[block] = sums[block] + cka_statistics(
                    x, y, shift_x=sums[block].shift_x, shift_y=sums[block].shift_y
                )
    return [1.0 - float(cka_from_statistics(found)) for found in sums]


def _distance(
    measure: Callable[[Tensor, Tensor, Tensor], Mean], model: nn.Module, task: str, batches: Sequence[Batch]
) -> list[float]:
    """Return the mean over sequences of a distance between each block's input and output; one forward pass."""
    totals: list[float] = []
    count = 0.0
    for signal, stack in _flows(model, batches):
        totals = totals or [0.0] * stack.depth
        found = [
            measure(entering.double(), leaving.double(), signal.masks[stack.name])
            for entering, leaving in _sides(signal, stack)
        ]
        totals = [total + float(mean.total) for total, mean in zip(totals, found, strict=True)]
        count += float(found[0].count)
    return [total / max(count, 1.0) for total in totals]


IMPORTANCE: dict[str, Criterion] = {
    "one_out_loss": one_out_loss,
    "one_out_kl": one_out_kl,
    "block_influence": partial(_distance, block_influence),
    "angular_distance": partial(_distance, angular_distance),
    "cka_redundancy": cka_redundancy,
}
"""Name -> criterion. The first two run the model once per block, the others once; `matching.importance` holds the
mathematics of Block Influence (ShortGPT) and the angular distance (Gromov et al.)."""

ONE_OUT = ("one_out_loss", "one_out_kl")
"""The criteria that run the model without each block in turn."""


def only_stack(model: nn.Module) -> Stack:
    """Return the stack of blocks of a model that has one; raises UserError for an encoder-decoder."""
    stacks = find_stacks(model)
    if "" not in stacks:
        raise UserError(
            "The importance of blocks is measured in models with one stack of blocks; this one has an encoder and a "
            "decoder."
        )
    return stacks[""]


@contextmanager
def quiet(model: nn.Module, batches: Sequence[Batch]) -> Iterator[None]:
    """Run a model in eval mode, without a graph, on the device of the batches; its modules' modes are put back."""
    if not batches:
        raise UserError("No rows to measure the importance of blocks on were given. Give at least one batch.")
    place = next(value.device for value in batches[0].values() if isinstance(value, Tensor))
    if next(model.parameters()).device != place:
        model.to(place)
    with evaluating(model), torch.no_grad():
        yield


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits = run_model(model, batch, (), logits=True).logits
    assert logits is not None, "run_model raises where a model has none"
    return logits


def _divergence(task: str, ours: Tensor, wanted: Tensor, batch: Batch) -> Mean:
    if task == "regression":
        return logit_mse(ours, wanted)
    if task == "multi-label-classification":
        return binary_kl(ours, wanted)
    mask = next_token_labels(batch["labels"]) != IGNORED_LABEL if task == "causal-lm" else None
    return forward_kl(ours, wanted, mask)


def _flows(model: nn.Module, batches: Sequence[Batch]) -> Iterator[tuple[Signal, Stack]]:
    """Yield what enters and leaves each block, batch by batch."""
    stack = only_stack(model)
    taps: list[Any] = [Tap(name, side) for name in stack.block_names for side in ("input", "output")]
    with quiet(model, batches):
        for batch in batches:
            yield run_model(model, batch, (), logits=False, taps=taps), stack


def _sides(signal: Signal, stack: Stack) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield input and output of one block after another; layers would not do: DeBERTa-v2 changes layer 1 on the way."""
    for name in stack.block_names:
        yield signal.taps[Tap(name, "input")], signal.taps[Tap(name, "output")]
