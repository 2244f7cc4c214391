"""What a teacher cache takes on the disk, known before a byte of it is written."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from layerdistill.core.types import FINAL, Needs, TopK
from layerdistill.models import find_stacks, unwrap
from layerdistill.signals.cache_folder import KEY_BYTES, LOGITS
from layerdistill.signals.cache_rows import StoredDtype, stored_bytes, token_dtype
from layerdistill.signals.cached_teacher import average_name, tap_name, top_names
from layerdistill.signals.taps import module_at

COUNT_BYTES = 8
"""How many rows an example has is an int64."""


def distinct_lengths(dataset: Any) -> list[int]:
    """Return the number of tokens of each distinct example of a tokenised dataset: equal ones are kept once."""
    columns = [name for name in ("input_ids", "token_type_ids") if name in dataset.column_names]
    found: dict[bytes, int] = {}
    for row in zip(*(dataset[name] for name in columns), strict=True):
        key = hashlib.blake2b(b"|".join(str(list(values)).encode() for values in row), digest_size=KEY_BYTES).digest()
        found[key] = len(row[0])
    return list(found.values())


def cached_bytes(
    needs: Needs,
    model: nn.Module,
    dtype: StoredDtype,
    lengths: Sequence[int],
    language_model: bool,
    there: Collection[str] = (),
) -> int:
    """Return the bytes of what `needs` asks for on examples of `lengths` tokens, without the signals that are `there`.

    A decoder is taken to have as many tokens as its encoder, and the projections of one attention to have one input,
    which is kept once. `model` may be on the meta device.
    """
    inner: Any = unwrap(model)
    widths = {name: stack.width for name, stack in find_stacks(inner).items()}
    per_token = {str(layer): widths[layer.stack] for layer in needs.teacher}
    inputs = {tap.module.rpartition(".")[0]: tap for tap in sorted(needs.teacher_taps, key=tap_name, reverse=True)}
    per_token |= {tap_name(tap): _tap_width(inner, tap.module) for tap in inputs.values()}
    per_example = {average_name(layer): widths[layer.stack] for layer in needs.teacher_averages}
    if needs.teacher_logits and language_model:
        per_token[str(FINAL)] = widths[""]
    elif needs.teacher_logits:
        per_example[LOGITS] = inner.config.num_labels
    examples, tokens = len(lengths), sum(lengths)
    total = sum(
        _top_bytes(which, dtype, examples, tokens) for which in needs.teacher_top if top_names(which)[0] not in there
    )
    for names, rows in ((per_token, tokens), (per_example, examples)):
        for name, width in names.items():
            if name not in there:
                kept: StoredDtype = "float32" if name == LOGITS else dtype
                total += rows * stored_bytes(width, kept) + examples * COUNT_BYTES
    return total + (examples * KEY_BYTES if total else 0)


def _top_bytes(which: TopK, dtype: StoredDtype, examples: int, tokens: int) -> int:
    """Return the bytes of likeliest tokens and their log-probabilities."""
    kept: StoredDtype = "float32" if dtype == "float32" else "float16"
    row = which.k * token_dtype(which.vocab_size).itemsize + stored_bytes(which.k + 1, kept)
    return tokens * row + 2 * examples * COUNT_BYTES


def _tap_width(model: nn.Module, path: str) -> int:
    """Return the width of what enters a projection: its weight's, whichever way round it is stored."""
    module: Any = module_at(model, path)
    return getattr(module, "in_features", None) or module.weight.shape[0]
