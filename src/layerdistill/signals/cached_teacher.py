"""The teacher from its cache: run once over the data, then read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import FINAL, Batch, LayerRef, Needs, Signal, StackName, Tap, TopK, TopTokens
from layerdistill.models import unwrap
from layerdistill.signals.cache_folder import LOGITS, CacheFolder, Place
from layerdistill.signals.cache_rows import LOG_PROBABILITIES, TOKENS, token_dtype
from layerdistill.signals.laid_out import LaidOut, spread
from layerdistill.signals.language_head import LanguageHead
from layerdistill.signals.live_teacher import LiveTeacher, blank_padding
from layerdistill.signals.row_keys import row_keys
from layerdistill.signals.source import batch_masks
from layerdistill.signals.taps import stack_of

SHARD_BYTES = 2**26
"""Bytes of signals, as the teacher gives them, after which a shard is written: what a kill may lose."""

SHARD_EXAMPLES = 2**16
"""Examples after which a shard is written, however little is kept of each."""

CHANGED = (
    "A training batch holds an example that the data did not hold when the teacher was cached: do examples change from "
    "epoch to epoch (augmentation, masking anew)? Fix their randomness by example, or write teacher.cache: off."
)


class RealTokens(NamedTuple):
    """Which positions `(batch, seq)` of a batch are real tokens, and how many each example has."""

    mask: Tensor
    counts: list[int]


class CachedTeacher:
    """What a teacher says about every example, read from a folder; the model is run for what is not there yet.

    A row is known by its content (`row_keys`), so any order, collator, padding, number of workers and processes will
    do. Of a language model the states after the final norm stand for its logits: its head makes them again. Values are
    those of the batches that `fill` was given, rounded to the folder's dtype; with float32 and batches laid out alike
    they are the live teacher's to the last bit.
    """

    def __init__(self, live: LiveTeacher, folder: CacheFolder, language_model: bool, only_cached: bool = False) -> None:
        """With `only_cached` the model is never run."""
        self.live = live
        self.folder = folder
        self.only_cached = only_cached
        self.language_model = language_model
        self.model = live.model

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """Return the teacher's signal, padding 0, in the dtype it is kept in (float32 for int8).

        Raises UserError for an example that was not in the data that the cache was filled from.
        """
        keys = row_keys(batch)
        if not self.folder.has(self.names(needs), keys):
            raise UserError(CHANGED)
        masks = batch_masks(unwrap(self.live.model), batch)
        # Counted once for all layers, for it makes a host wait for its accelerator.
        real = {stack: RealTokens(mask, mask.ne(0).sum(1).tolist()) for stack, mask in masks.items()}
        rows = {layer: self._tokens(keys, str(layer), real[layer.stack]) for layer in needs.teacher}
        taps = self._taps(keys, needs.teacher_taps, real)
        averages = {
            layer: self._examples(keys, average_name(layer), masks[layer.stack]) for layer in needs.teacher_averages
        }
        top = {which: self._top(keys, which, real[""]) for which in needs.teacher_top}
        logits = self._logits(keys, real) if needs.teacher_logits else None
        return Signal(logits, LaidOut(rows, masks), masks, taps, averages, top, rows)

    @cached_property
    def head(self) -> LanguageHead | None:
        """What makes logits of a language model's states; raises UserError where that is not known."""
        if not self.language_model:
            return None
        try:
            return LanguageHead(self.model)
        except UserError as error:
            raise UserError(
                f"{type(self.model).__name__} makes its logits in another way than by its final norm and its head, so "
                "its states cannot be kept in their place. Write teacher.cache: off."
            ) from error

    def names(self, needs: Needs) -> list[str]:
        """Return the names under which the folder keeps what `needs` asks for."""
        return kept_names(needs, needs.teacher_logits and self.head is not None)

    def fill(self, batches: Iterable[Batch], needs: Needs, said: Callable[[int], None] = lambda examples: None) -> None:
        """Run the teacher on the batches that the folder lacks and keep what `needs` asks for.

        `said` is told the number of examples that each batch had. Raises UserError when the model may not be run.
        """
        filler = Filler(self, needs)
        for batch in batches:
            filler.add(batch)
            said(len(batch["input_ids"]))
        filler.close()

    def rows_of(self, signal: Signal, keys: Sequence[bytes]) -> dict[bytes, dict[str, Tensor]]:
        """Return the rows `(n, width)` of every part of a signal, by example and name, on the processor."""
        found: dict[str, list[Tensor]] = {}
        cut: dict[int, list[Tensor]] = {}  # query, key and value are made of one tensor: it is cut and kept once
        for layer, rows in signal.rows.items():
            found[str(layer)] = list(rows.cpu().split(signal.masks[layer.stack].ne(0).sum(1).tolist()))
        for name, tensor, stack in [
            *((str(layer), signal.hidden[layer], layer.stack) for layer in signal.hidden if layer not in signal.rows),
            *((tap_name(tap), tensor, self._stack(tap)) for tap, tensor in signal.taps.items()),
            *((name, tensor, "") for which, said in signal.top.items() for name, tensor in named_top(which, said)),
        ]:
            if id(tensor) not in cut:
                kept = signal.masks[stack].bool()
                cut[id(tensor)] = list(tensor[kept].cpu().split(kept.sum(1).tolist()))
            found[name] = cut[id(tensor)]
        for which in signal.top:
            tokens, narrow = top_names(which)[0], token_dtype(which.vocab_size)
            found[tokens] = [ids.to(narrow) for ids in found[tokens]]
        for layer, tensor in signal.averages.items():
            found[average_name(layer)] = list(tensor.cpu().split(1))
        if signal.logits is not None:
            found[LOGITS] = list(signal.logits.reshape(len(keys), -1).cpu().split(1))
        return {key: {name: rows[number] for name, rows in found.items()} for number, key in enumerate(keys)}

    def among(self, needs: Needs, names: Sequence[str]) -> Needs:
        """Return the part of `needs` that is kept under `names`, as the live teacher is to be asked for it."""
        wanted = Needs(
            teacher=frozenset(layer for layer in needs.teacher if str(layer) in names),
            teacher_logits=LOGITS in names,
            teacher_taps=frozenset(tap for tap in needs.teacher_taps if tap_name(tap) in names),
            teacher_averages=frozenset(layer for layer in needs.teacher_averages if average_name(layer) in names),
            teacher_top=frozenset(which for which in needs.teacher_top if top_names(which)[0] in names),
        )
        if needs.teacher_logits and self.head is not None and str(FINAL) in names:
            wanted |= Needs(teacher=frozenset({FINAL}))
        return wanted

    def _taps(
        self, keys: Sequence[bytes], taps: Iterable[Tap], real: Mapping[StackName, RealTokens]
    ) -> dict[Tap, Tensor]:
        """Return every tap's rows, as one tensor where the folder keeps them once for several taps."""
        found: dict[Tap, Tensor] = {}
        made: dict[tuple[Place, ...], Tensor] = {}
        for tap in taps:
            places = tuple(self.folder.places[tap_name(tap)][key] for key in keys)
            if places not in made:
                tokens = real[self._stack(tap)]
                made[places] = spread(self._tokens(keys, tap_name(tap), tokens), tokens.mask)
            found[tap] = made[places]
        return found

    def _stack(self, tap: Tap) -> StackName:
        return stack_of(unwrap(self.live.model), tap)

    def _tokens(self, keys: Sequence[bytes], name: str, real: RealTokens) -> Tensor:
        """Return `(tokens, width)`, one example after the other, on the mask's device.

        Raises UserError where an example has another number of tokens than when it was cached.
        """
        rows = [self.folder.rows(name, key) for key in keys]
        if [len(row) for row in rows] != real.counts:
            raise UserError(CHANGED)
        return torch.cat(rows).to(real.mask.device)

    def _examples(self, keys: Sequence[bytes], name: str, mask: Tensor) -> Tensor:
        """Return `(batch, width)`, on the mask's device."""
        return torch.cat([self.folder.rows(name, key) for key in keys]).to(mask.device)

    def _top(self, keys: Sequence[bytes], which: TopK, real: RealTokens) -> TopTokens:
        mask = real.mask
        tokens, log_probabilities = top_names(which)
        ids = torch.cat([self.folder.rows(tokens, key).long() for key in keys]).to(mask.device)
        likely = self._tokens(keys, log_probabilities, real).float()
        top = TopTokens(spread(ids, mask), spread(likely, mask))
        return blank_padding(top, which, mask.bool(), self.live.vocabulary)

    def _logits(self, keys: Sequence[bytes], real: Mapping[StackName, RealTokens]) -> Tensor:
        if self.head is None:
            return self._examples(keys, LOGITS, next(iter(real.values())).mask)
        states = spread(self._tokens(keys, str(FINAL), real[""]), real[""].mask)
        with torch.no_grad():
            return self.head(states.flatten(0, 1), FINAL).view(*states.shape[:2], -1)


class Filler:
    """Runs a teacher batch by batch for what its cache lacks and keeps that, a shard at a time."""

    def __init__(self, cached: CachedTeacher, needs: Needs) -> None:
        self.cached = cached
        self.needs = needs
        self.names = cached.names(needs)
        self.waiting: dict[bytes, dict[str, Tensor]] = {}
        self.size = 0

    def add(self, batch: Batch) -> Signal | None:
        """Return what the teacher was made to say about a batch, None where nothing was lacking.

        Raises UserError when the model may not be run.
        """
        cached, keys = self.cached, row_keys(batch)
        lacking = [name for name in self.names if not cached.folder.has([name], keys)]
        if not lacking:
            return None
        if cached.only_cached:
            raise UserError(
                f"teacher.cache is 'require', but the cache in {cached.folder.folder} lacks {', '.join(lacking)} for "
                "some examples. Run `layerdistill cache` with the same recipe first, or write teacher.cache: fill."
            )
        signal = cached.live.signal(batch, cached.among(self.needs, lacking))
        self.keep(keys, signal)
        return signal

    def keep(self, keys: Sequence[bytes], signal: Signal) -> None:
        """Keep the rows of a signal; a shard is written when it is full."""
        found = self.cached.rows_of(signal, keys)
        if self.waiting and next(iter(self.waiting.values())).keys() != next(iter(found.values())).keys():
            self.close()  # a shard holds the same of each example
        self.waiting.update(found)
        distinct = ({id(rows): rows for rows in one.values()} for one in found.values())
        self.size += sum(rows.nbytes for one in distinct for rows in one.values())
        if self.size >= SHARD_BYTES or len(self.waiting) >= SHARD_EXAMPLES:
            self.close()

    def close(self) -> None:
        """Write what is waiting."""
        self.cached.folder.append(self.waiting)
        self.waiting, self.size = {}, 0


def kept_names(needs: Needs, states_for_logits: bool) -> list[str]:
    """Return the names under which `needs` is kept; a language model's states stand for its logits."""
    names = {str(layer) for layer in needs.teacher} | {tap_name(tap) for tap in needs.teacher_taps}
    names |= {average_name(layer) for layer in needs.teacher_averages}
    names |= {name for which in needs.teacher_top for name in top_names(which)}
    if needs.teacher_logits:
        names.add(str(FINAL) if states_for_logits else LOGITS)
    return sorted(names)


def tap_name(tap: Tap) -> str:
    """Return the name under which a tap is kept."""
    return f"tap:{tap.module}:{tap.side}"


def average_name(layer: LayerRef) -> str:
    """Return the name under which a layer's average over tokens is kept."""
    return f"average:{layer}"


def top_names(which: TopK) -> tuple[str, str]:
    """Return the names under which likeliest tokens and their log-probabilities are kept."""
    said = f"{which.k}:{which.temperature}:{which.vocab_size or 'all'}"
    return f"{TOKENS}{said}", f"{LOG_PROBABILITIES}{said}"


def named_top(which: TopK, said: TopTokens) -> Iterator[tuple[str, Tensor]]:
    """Yield likeliest tokens and their log-probabilities with their names."""
    yield from zip(top_names(which), (said.ids, said.log_probabilities), strict=True)
