"""A tokenizer with a part of its vocabulary that cuts every text of a corpus into the same pieces as the whole one."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from layerdistill.core.errors import UserError

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token that stands for one byte in vocabularies that fall back on bytes."""


@dataclass(frozen=True)
class TrimmedVocabulary:
    """A smaller tokenizer; `kept[i]` is the whole tokenizer's id of the token that has the id i here, ascending."""

    tokenizer: PreTrainedTokenizerBase
    kept: tuple[int, ...]


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, used: Iterable[int]) -> TrimmedVocabulary:
    """Return a tokenizer of the same class with the tokens `used` and those that it cannot do without.

    These are all special and added tokens, every single character (`x` and `##x` in a WordPiece, all 256 bytes in a
    byte-level BPE), the parts that a kept token of a BPE is merged from, and the least likely piece of a Unigram, by
    which it scores unknown characters. New words are cut into smaller pieces. Where `used` holds the tokens of a text,
    the text gives the same pieces: fewer candidates, of which the best was kept, have the same best. (A WordPiece that
    knows a character inside words only together with others may find pieces where it found none.)
    Raises UserError for a tokenizer that no `tokenizer.json` can describe, and for a model of unknown type.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"student.vocabulary is 'trimmed', but {type(tokenizer).__name__} is a slow tokenizer, written in Python: "
            "its vocabulary cannot be taken apart. Use a tokenizer with a tokenizer.json, or vocabulary: full."
        )
    backend: Tokenizer = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    state = json.loads(backend.to_str())
    ids = tokenizer.get_vocab()
    tokens = {number: token for token, number in ids.items()}
    named = {container[key] for container, key in _places_of_ids(state)} | set(tokenizer.all_special_ids)
    needed = {tokens[number] for number in {*used, *named} if number in tokens}
    needed |= {added["content"] for added in state["added_tokens"]}
    needed |= _needed_by_model(state["model"], needed)
    kept = tuple(sorted(ids[token] for token in needed if token in ids))
    new = {old: number for number, old in enumerate(kept)}
    for container, key in _places_of_ids(state):
        container[key] = new.get(container[key], container[key])
    _keep(state["model"], {tokens[old]: number for old, number in new.items()})
    return TrimmedVocabulary(_with_backend(tokenizer, state, [tokens[old] for old in kept]), kept)


def _with_backend(tokenizer: PreTrainedTokenizerBase, state: Any, expected: list[str]) -> PreTrainedTokenizerBase:
    """Return a copy of `tokenizer` that is what `state` says, in which the tokens `expected` have the ids 0, 1, ..."""
    whole: Any = tokenizer
    backend = Tokenizer.from_str(json.dumps(state))
    backend.encode_special_tokens = whole.backend_tokenizer.encode_special_tokens
    trimmed = copy.deepcopy(whole)
    trimmed._tokenizer = backend
    # They name ids of the whole vocabulary, and tokenizer.json has them all.
    trimmed.init_kwargs.pop("added_tokens_decoder", None)
    if trimmed.get_vocab() != {token: number for number, token in enumerate(expected)}:
        raise UserError(
            f"student.vocabulary is 'trimmed', but the ids of {type(tokenizer).__name__} have gaps that its added "
            "tokens would move into, so its vocabulary cannot be renumbered. Use vocabulary: full."
        )
    return trimmed


def _places_of_ids(state: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every token id in a `tokenizer.json` outside its model's vocabulary."""
    places: list[tuple[Any, Any]] = [(added, "id") for added in state["added_tokens"]]
    if state.get("padding"):
        places.append((state["padding"], "pad_id"))
    processors = [state["post_processor"]] if state.get("post_processor") else []
    while processors:
        processor = processors.pop()
        processors += processor.get("processors", [])
        if processor["type"] == "TemplateProcessing":
            lists = [special["ids"] for special in processor["special_tokens"].values()]
            places += [(numbers, place) for numbers in lists for place in range(len(numbers))]
        if processor["type"] in ("BertProcessing", "RobertaProcessing"):
            places += [(processor[name], 1) for name in ("sep", "cls")]
    return places


def _needed_by_model(model: Any, needed: set[str]) -> set[str]:
    """Return the tokens that the model part of a `tokenizer.json` needs in order to give the tokens `needed`."""
    kind = model["type"]
    if kind not in ("WordPiece", "BPE", "Unigram", "WordLevel"):
        raise UserError(
            f"student.vocabulary is 'trimmed', but the tokenizer's model is of the type {kind}, and only WordPiece, "
            "BPE, Unigram and WordLevel are known. Use vocabulary: full."
        )
    vocabulary = [piece for piece, _ in model["vocab"]] if kind == "Unigram" else list(model["vocab"])
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    found = {token for token in vocabulary if len(token.removeprefix(prefix).removesuffix(suffix)) <= 1}
    found |= {token for token in vocabulary if BYTE.fullmatch(token)}
    if kind == "Unigram":
        found.add(min(model["vocab"], key=lambda entry: entry[1])[0])
        return found | ({vocabulary[model["unk_id"]]} if model["unk_id"] is not None else set())
    if model.get("unk_token") in model["vocab"]:
        found.add(model["unk_token"])
    return found | _merged_from(model["merges"], len(prefix), needed) if kind == "BPE" else found


def _merged_from(merges: list[Any], prefix: int, needed: set[str]) -> set[str]:
    """Return every token that a needed one can be merged from, in one step or in many.

    Where several pairs give the same token all of them are kept, so that it does not matter which comes first.
    """
    parts: dict[str, list[tuple[str, str]]] = {}
    for left, right in map(_pair, merges):
        parts.setdefault(left + right[prefix:], []).append((left, right))
    found, waiting = set(needed), list(needed)
    while waiting:
        for pair in parts.get(waiting.pop(), ()):
            waiting += [token for token in pair if token not in found]
            found.update(pair)
    return found


def _pair(merge: Any) -> tuple[str, str]:
    """Return the two tokens of a merge, which older files write as one string."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _keep(model: Any, new: dict[str, int]) -> None:
    """Reduce the model part of a `tokenizer.json`, in place, to the tokens of `new`, with its ids."""
    if model["type"] == "Unigram":
        unknown = model["vocab"][model["unk_id"]][0] if model["unk_id"] is not None else None
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in new]
        model["unk_id"] = next((n for n, entry in enumerate(model["vocab"]) if entry[0] == unknown), None)
        return
    model["vocab"] = {token: new[token] for token in model["vocab"] if token in new}
    if model["type"] == "BPE":
        prefix = len(model.get("continuing_subword_prefix") or "")
        merges = [_pair(merge) for merge in model["merges"]]
        model["merges"] = [
            [left, right] for left, right in merges if {left, right, left + right[prefix:]} <= new.keys()
        ]
