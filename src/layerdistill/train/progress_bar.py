"""What a person sees while a stage trains: a bar with the time left, or a line now and then without a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LINES = 10
"""Lines printed per stage where there is no terminal."""


class ProgressBar(TrainerCallback):
    """One bar per stage, with the loss of the last log line."""

    def __init__(self, title: str, console: Console) -> None:
        self.title = title
        self.console = console
        self.bar: Progress | None = None
        self.loss = ""
        self.printed_at = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the bar at the step that training goes on from."""
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        columns = [
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        ]  # fmt: skip
        self.bar = Progress(*columns, console=self.console)
        self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, loss="")
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar, or print a line at every tenth of the way."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step, loss=self.loss)
        elif state.is_world_process_zero:
            tenth = LINES * state.global_step // max(state.max_steps, 1)
            if tenth > self.printed_at:
                self.printed_at = tenth
                self.console.print(f"{self.title}: step {state.global_step} of {state.max_steps} {self.loss}".rstrip())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Remember the loss."""
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the bar down."""
        self.close()

    def close(self) -> None:
        """Stop drawing; needed too when training ends with an exception."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
