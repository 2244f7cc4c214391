"""Running text for language models: one stream of tokens, cut into blocks to train on and windows to score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from layerdistill.core.errors import UserError
from layerdistill.core.types import IGNORED_LABEL

Tokens = NDArray[np.int32]
Item = TypeVar("Item")

PIECE = 10_000
"""Characters after which a longer text is cut at the next line end; long texts cost tokenizers much time and memory."""
BATCH_CHARACTERS = 1_000_000
"""Characters given to the tokenizer at once."""


def encode_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, end: bool) -> list[Tokens]:
    """Return the token ids of each text, `(tokens,)`.

    A document begins with the begin-of-text token where the tokenizer itself puts one (Llama does, GPT-2 does not), and
    with `end` it ends with the end-of-text token. An empty text gives no tokens at all. No token crosses the pieces
    that texts above `PIECE` characters are cut into. Raises UserError when the tokenizer has no end-of-text token.
    """
    if end and tokenizer.eos_token_id is None:
        raise UserError(
            "data.separator is 'eos', but the tokenizer has no end-of-text token (eos_token). Use a tokenizer of a "
            "causal language model, or set data.separator: none."
        )
    parts: list[list[Tokens]] = [[] for _ in texts]
    numbered = ((number, piece) for number, text in enumerate(texts) for piece in _pieces([text]))
    for number, ids in _encode(numbered, tokenizer):
        parts[number].append(ids)
    head = np.array(_begin(tokenizer), dtype=np.int32)
    tail = np.array([tokenizer.eos_token_id] if end else [], dtype=np.int32)
    return [np.concatenate([head, *part, tail]) if part else head[:0] for part in parts]


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    whole = tokenizer("a")["input_ids"]
    return whole[:1] if whole and whole[0] == tokenizer.bos_token_id else []


def _encode(numbered: Iterable[tuple[int, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, Tokens]]:
    """Yield the numbers with the token ids of the texts beside them, without any special token."""
    for batch in _batches(numbered, lambda pair: len(pair[1])):
        encoded = tokenizer([text for _, text in batch], add_special_tokens=False, verbose=False)
        for (number, _), ids in zip(batch, encoded["input_ids"], strict=True):
            yield number, np.array(ids, dtype=np.int32)


def _batches(items: Iterable[Item], characters: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yield items in lists of at least `BATCH_CHARACTERS` characters together; the last may have fewer."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += characters(item)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, joined, in pieces that end with the first line end after `PIECE` characters."""
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while stop := rest.find("\n", start + PIECE) + 1:
            yield rest[start:stop]
            start = stop
        rest = rest[start:]
    if rest:
        yield rest


def encode_stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, separator: str) -> Iterator[Tokens]:
    """Yield all texts as one stream of token ids, part by part, each `(tokens,)`; a million characters are held.

    `eos`: each text is a document that ends with the end-of-text token. `none`: the texts are joined as they are and
    tokenised as one.
    """
    if separator == "eos":
        return chain.from_iterable(encode_documents(batch, tokenizer, end=True) for batch in _batches(texts, len))
    parts = (ids for _, ids in _encode(((0, piece) for piece in _pieces(texts)), tokenizer))
    head = np.array(_begin(tokenizer), dtype=np.int32)
    return chain.from_iterable((part,) if number else (head, part) for number, part in enumerate(parts))


def blocks(parts: Iterable[Tokens], length: int) -> Iterator[Tokens]:
    """Cut a stream into consecutive blocks of `length` tokens; what is left over at the end is dropped."""
    held: list[Tokens] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= length:
            whole = np.concatenate(held)
            cut = size - size % length
            yield from (whole[start : start + length] for start in range(0, cut, length))
            held, size = [whole[cut:]], size - cut


def windows(stream: Tokens, length: int, stride: int | None = None) -> list[tuple[Tokens, Tokens]]:
    """Return (input ids, labels) of windows of at most `length` tokens that start every `stride` tokens.

    Tokens that an earlier window has scored are context: their label is -100. With `stride < length` every token of the
    stream but the first is scored once; without overlap (`stride` None or `length`) the first token of each window has
    nothing before it and the model's shift leaves it out. The last window may be shorter; one of a single token is
    left out. The procedure is that of https://huggingface.co/docs/transformers/perplexity.
    """
    found, scored = [], 0
    for start in range(0, len(stream), stride or length):
        ids = stream[start : start + length]
        if len(ids) < 2 or scored == len(stream):
            break
        labels = ids.copy()
        labels[: scored - start] = IGNORED_LABEL
        scored = start + len(ids)
        found.append((ids, labels))
    return found
