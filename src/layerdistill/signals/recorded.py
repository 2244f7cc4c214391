"""A frozen model run once over the data: its hidden states, kept in a temporary file and served batch by batch."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.core.types import Batch, LayerRef, Needs, Signal, StackName
from layerdistill.models import find_stacks, unwrap
from layerdistill.signals.live_teacher import LiveTeacher
from layerdistill.signals.row_keys import row_keys
from layerdistill.signals.source import batch_masks

Position = Literal["first", "last"]
"""The first or the last real token of an example."""


class RecordedTeacher:
    """What a frozen model says about every example, in eval mode, run once and then read from a record.

    A row is known by its content (its real token ids and token types), so any collator, order and padding will do. The
    model is run in the one order of `batches`, once, at the first call of `signal`: a state in the record does not
    depend on how far training has come, so that a resumed run has the same to the last bit. Kept are `layers`, in the
    model's dtype, without padding; with `positions`, which names one for each stack, the states of that token only.

    The file has no name and is gone with the process. Each process of a distributed run records for itself.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        layers: Sequence[LayerRef],
        positions: Mapping[StackName, Position] | None = None,
    ) -> None:
        self.live = LiveTeacher(model)
        self.batches = batches
        self.widths = {name: stack.width for name, stack in find_stacks(model).items()}
        self.layers = {
            stack: [layer for layer in dict.fromkeys(layers) if layer.stack == stack] for stack in self.widths
        }
        self.positions = positions
        self.places: dict[bytes, dict[StackName, tuple[int, int]]] = {}
        self.dtype = torch.float32
        self.memory: mmap.mmap | None = None

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """Return the recorded layers with zeros on padding; with `positions` the axis `seq` has length 1.

        Raises UserError for a row that was not in `batches`, ValueError for what is not recorded.
        """
        recorded = {layer for layers in self.layers.values() for layer in layers}
        others = needs.teacher_logits or needs.teacher_taps or needs.teacher_averages or needs.teacher_top
        if others or not needs.teacher <= recorded:
            raise ValueError(f"the record holds the layers {sorted(recorded)} and nothing else, not {needs}")
        if self.memory is None:
            self.memory = self._record()
        keys, masks = row_keys(batch), batch_masks(unwrap(self.live.model), batch)
        if self.positions is not None:
            masks = {stack: torch.ones_like(mask[:, :1]) for stack, mask in masks.items()}
        hidden: dict[LayerRef, Tensor] = {}
        for stack, layers in self.layers.items():
            if layers:
                states = self._read(keys, stack, masks[stack])
                hidden |= {layer: states[number] for number, layer in enumerate(layers) if layer in needs.teacher}
        return Signal(None, hidden, masks)

    def close(self) -> None:
        """Give the disk back; nothing can be read any more."""
        if self.memory is not None:
            self.memory.close()

    def _record(self) -> mmap.mmap:
        needs = Needs(teacher=frozenset(layer for layers in self.layers.values() for layer in layers))
        end = 0
        try:
            with tempfile.TemporaryFile() as file:
                for batch in self.batches:
                    signal = self.live.signal(batch, needs)
                    for row, key in enumerate(row_keys(batch)):
                        if key in self.places:
                            continue
                        self.places[key] = {}
                        for stack, layers in self.layers.items():
                            if layers:
                                states = self._states_of(signal, layers, row)
                                self.places[key][stack] = end, states.shape[1]
                                end += file.write(states.contiguous().view(torch.uint8).numpy().tobytes())
                file.flush()
                return mmap.mmap(file.fileno(), end, access=mmap.ACCESS_COPY)
        except OSError as error:
            self.places = {}
            raise UserError(
                f"The record of hidden states cannot be written to {tempfile.gettempdir()}: {error.strerror or error}, "
                f"after {end / 1e9:.2f} GB. Free space there, name another folder in the variable TMPDIR, or lower the "
                "size up to which states are recorded; the model is then run at every step."
            ) from error

    def _states_of(self, signal: Signal, layers: Sequence[LayerRef], row: int) -> Tensor:
        """Return one example's states `(layers, tokens, hidden)` on the processor."""
        kept = signal.masks[layers[0].stack][row].bool()
        states = torch.stack([signal.hidden[layer][row][kept] for layer in layers])
        if self.positions is not None:
            states = states[:, :1] if self.positions[layers[0].stack] == "first" else states[:, -1:]
        self.dtype = states.dtype
        return states.cpu()

    def _read(self, keys: Sequence[bytes], stack: StackName, mask: Tensor) -> Tensor:
        """Return the states of a batch `(layers, batch, seq, hidden)`, on the device of its mask."""
        assert self.memory is not None, "signal() records first"
        number, width = len(self.layers[stack]), self.widths[stack]
        states = torch.zeros(number, *mask.shape, width, dtype=self.dtype)
        for row, (key, kept) in enumerate(zip(keys, mask.cpu().bool(), strict=True)):
            if key not in self.places:
                raise UserError(
                    "A training batch holds an example that the training data did not hold when they were recorded: do "
                    "examples change from epoch to epoch? Write stage_one: {record_gb: 0}."
                )
            offset, tokens = self.places[key][stack]
            count = number * tokens * width
            found = torch.frombuffer(self.memory, dtype=self.dtype, count=count, offset=offset)
            states[:, row, kept] = found.view(number, tokens, width)
        return states.to(mask.device)


def fits_in(
    most: float, model: nn.Module, batches: Iterable[Batch], layers: Sequence[LayerRef], one_position: bool
) -> bool:
    """Return whether a record of `layers` over `batches` has at most `most` bytes; stops counting when it has more."""
    inner = unwrap(model)
    widths = {name: stack.width for name, stack in find_stacks(model).items()}
    size = next(model.parameters()).element_size()
    total = 0
    for batch in batches:
        masks = batch_masks(inner, batch)
        for layer in layers:
            tokens = len(masks[layer.stack]) if one_position else int(masks[layer.stack].sum())
            total += tokens * widths[layer.stack] * size
        if total > most:
            return False
    return True
