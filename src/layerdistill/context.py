"""What a method may ask of the run around it: rows to choose by, a score, and a memory of what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import nn

from layerdistill.core.errors import UserError
from layerdistill.core.files import explained_disk_errors, read_json, write_json
from layerdistill.core.processes import agreed
from layerdistill.core.types import Batch
from layerdistill.data import CALIBRATION
from layerdistill.evaluate import evaluate_model
from layerdistill.evaluate.config import LOWER_IS_BETTER
from layerdistill.evaluate.evaluator import rows_at_once
from layerdistill.train.config import argument_of, count_epochs
from layerdistill.train.stage import StageInput

Chosen = TypeVar("Chosen")

DECISIONS_FILE = "decisions.json"


def known_decisions(path: Path) -> dict[str, Any]:
    """Return what a decisions file holds, nothing where there is none."""
    return read_json(path) if path.exists() else {}


class LiveContext:
    """The context of a run in a folder; `metrics` are the recipe's, the first of which `score` is."""

    def __init__(self, given: StageInput, metrics: Sequence[str], batch_size: int = 64) -> None:
        self.given = given
        self.metrics = list(metrics)
        self.batch_size = batch_size

    @property
    def epochs(self) -> int:
        """Passes over the training data in one stage, on all processes together, rounded up; 1 for a stream."""
        data = self.given.datasets["train"]
        return count_epochs(len(data), self._argument) if isinstance(data, Sized) else 1

    def say(self, sentence: str) -> None:
        """Print a sentence."""
        self.given.console.print(sentence, highlight=False, markup=False)

    def decide(self, name: str, choose: Callable[[], Chosen]) -> Chosen:
        """Return what decisions.json holds under `name`, else choose and write it there."""
        path = self.given.folder / DECISIONS_FILE
        PartialState().wait_for_everyone()
        known = known_decisions(path)
        PartialState().wait_for_everyone()
        if name not in known:
            chosen = agreed(choose())  # free disk or rounding may differ between processes
            known = {**known_decisions(path), name: chosen}  # what was decided on the way is kept too
            if PartialState().is_main_process:
                with explained_disk_errors("The decisions", path):
                    write_json(path, known)
        PartialState().wait_for_everyone()
        return known[name]

    def calibration(self) -> list[Batch]:
        """Return the calibration rows in batches; raises UserError when none were set aside."""
        if CALIBRATION not in self.given.datasets:
            raise UserError("No rows were set aside for choosing. Give the method a `calibration` section.")
        rows = self.given.datasets[CALIBRATION]
        size = rows_at_once(rows, self.given.collator, self.given.task, self.given.tokenizer, self.batch_size)
        return list(self._batches(rows, size))

    def score(self, model: nn.Module) -> float:
        """Return the first metric on the calibration rows, more is better; raises UserError where it is undefined."""
        found = self._measure(model, CALIBRATION, self.metrics[:1])
        value = found[self.metrics[0]]
        if value is None:
            raise UserError(
                f"{self.metrics[0]} is undefined on the calibration rows. Take more of them (method.calibration."
                "examples), or another first metric."
            )
        return -value if self.metrics[0] in LOWER_IS_BETTER else value

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """Return all metrics on the validation split."""
        return self._measure(model, "validation", self.metrics) if "validation" in self.given.datasets else {}

    def training_batches(self) -> Iterator[Batch]:
        """Return the training rows, batch by batch in their order; raises UserError for a stream, which has no end."""
        data = self.given.datasets["train"]
        if not isinstance(data, Sized):
            raise UserError(
                f"train_dataset is a {type(data).__name__}, which has no length, but what a model says about all of it "
                "was to be recorded. Pass a datasets.Dataset, or record nothing (ted: stage_one.record_gb: 0)."
            )
        return self._batches(data, self._argument("per_device_train_batch_size"))

    def _argument(self, name: str) -> Any:
        return argument_of(self.given.training, name)

    def _measure(self, model: nn.Module, split: str, metrics: Sequence[str]) -> dict[str, float | None]:
        device = PartialState().device
        dataset, given = self.given.datasets[split], self.given
        found = evaluate_model(model, dataset, given.collator, given.task, metrics, self.batch_size, device)
        return found.metrics

    def _batches(self, dataset: Any, size: int) -> Iterator[Batch]:
        device = PartialState().device
        for start in range(0, len(dataset), size):
            rows = [dataset[row] for row in range(start, min(start + size, len(dataset)))]
            batch = self.given.collator(rows)
            yield {
                name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
            }
