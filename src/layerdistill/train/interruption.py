"""Ctrl-C and SIGTERM end a run after the step in work, with its state saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Interruption(TrainerCallback):
    """Turns the first signal into "save, then stop"; a second one ends the program at once."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM inside the block (only possible in the main thread)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop when this process, or any other of the run, was asked to."""
        if self.anyone_asked():
            self.asked = True
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Undo what transformers does at the end of an epoch: stopping in its middle is not its end.

        An evaluation there would move the random state, and a second save would put it into the checkpoint.
        """
        if self.asked:
            control.should_log = control.should_evaluate = control.should_save = False

    def anyone_asked(self) -> bool:
        """Whether a signal reached any process; signals arrive at different steps, so the processes must agree."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.asked
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor(int(self.asked), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
