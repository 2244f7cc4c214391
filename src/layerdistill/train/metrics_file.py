"""`metrics.jsonl`: every log line of a run, appended as it happens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layerdistill.core.files import write_text


class MetricsFile(TrainerCallback):
    """Appends one JSON object per log line: stage, step, epoch and the logged numbers.

    When a stage goes on from a checkpoint, the lines of that stage after the checkpoint's step are dropped first, so a
    file never holds the same step twice.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop the lines that will be written again."""
        if state.is_world_process_zero and self.path.exists():
            kept = [line for line in read_lines(self.path) if not self.comes_again(line, state.global_step)]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def comes_again(self, line: dict[str, Any], step: int) -> bool:
        """Whether a line belongs to this stage and lies after `step`."""
        return line["stage"] == self.stage and line["step"] > step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Append one line."""
        if state.is_world_process_zero and logs:
            line = {"stage": self.stage, "step": state.global_step}
            line |= {key: value if is_json_number(value) else str(value) for key, value in logs.items()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


def is_json_number(value: Any) -> bool:
    """Whether JSON can hold the value as a number."""
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
