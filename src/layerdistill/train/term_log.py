"""What is written about each term: its mean, the norm of its gradient, and an alarm when it does nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerdistill.core.errors import UserError

logger = logging.getLogger(__name__)

PREFIX = "distill/"
QUIET_AFTER = 3
"""Log lines (or gradient measurements) in a row without any change before the alarm is raised."""


class TermLog:
    """Collects the terms' sums on the device and turns them into numbers only when a log line is written.

    No host synchronisation happens between log lines. Gradient norms are measured every `gradient_steps` steps, on the
    student's parameters, for each term with its coefficient; 0 turns them off.
    """

    def __init__(self, terms: Iterable[Any], gradient_steps: int) -> None:
        self.names = [term.name for term in terms]
        self.gradient_steps = gradient_steps
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.gradient_norms: dict[str, float] = {}
        self.measured_step = -1
        self.last_values: dict[str, float] = {}
        self.unchanged: dict[str, int] = {}
        self.without_gradient: dict[str, int] = {}

    def add(self, sums: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add one micro-batch's totals and counts."""
        for name, (total, count) in sums.items():
            before = self.sums.get(name)
            now = total.detach(), count.detach()
            self.sums[name] = now if before is None else (before[0] + now[0], before[1] + now[1])

    def measures_at(self, step: int) -> bool:
        """Whether gradient norms are due at this step; only the first micro-batch of a step is measured."""
        return self.gradient_steps > 0 and step % self.gradient_steps == 0 and step != self.measured_step

    def measure_gradients(self, shares: Mapping[str, Tensor], student: nn.Module, step: int) -> None:
        """Measure the gradient norm of each term on the parameters that train, without touching `.grad`."""
        self.measured_step = step
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        for name, share in shares.items():
            gradients: list[Tensor] = []
            if share.requires_grad:
                found = torch.autograd.grad(share, parameters, retain_graph=True, allow_unused=True)
                gradients = [gradient for gradient in found if gradient is not None]
            norm = torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0
            self.gradient_norms[name] = norm
            self.without_gradient[name] = self.without_gradient.get(name, 0) + 1 if norm == 0.0 else 0
            if self.without_gradient[name] == QUIET_AFTER:
                logger.warning(
                    "ALARM: the term '%s' gave no gradient to the student in %d measurements. It costs time and "
                    "teaches nothing: check its layer map, its loss and its weight.",
                    name,
                    QUIET_AFTER,
                )

    def refuse_pending(self, step: int) -> None:
        """Raise UserError when a sum since the last log line is not finite, so that no broken state is checkpointed."""
        refuse_not_finite({PREFIX + name: total.item() for name, (total, _) in self.sums.items()}, step)

    def take(self, accelerator: Any, step: int) -> dict[str, float]:
        """Return the means over all processes since the last call; raises UserError when one is not finite."""
        logs: dict[str, float] = {}
        if self.sums:
            names = sorted(self.sums)
            pairs = torch.stack([torch.stack([part.double() for part in self.sums[name]]) for name in names])
            for name, (total, count) in zip(names, accelerator.reduce(pairs, "sum").tolist(), strict=True):
                logs[PREFIX + name] = total / max(count, 1.0)
        self.sums = {}
        refuse_not_finite(logs, step)
        self.watch_constants(logs)
        logs.update({f"grad_norm/{name}": norm for name, norm in self.gradient_norms.items()})
        self.gradient_norms = {}
        return logs

    def watch_constants(self, logs: Mapping[str, float]) -> None:
        """Raise the alarm when a term has had exactly the same mean in several log lines."""
        for name, value in logs.items():
            self.unchanged[name] = self.unchanged.get(name, 0) + 1 if value == self.last_values.get(name) else 0
            self.last_values[name] = value
            if self.unchanged[name] == QUIET_AFTER:
                logger.warning(
                    "ALARM: '%s' has been exactly %g in %d log lines. A term that does not change teaches nothing: "
                    "check what it compares.",
                    name,
                    value,
                    QUIET_AFTER + 1,
                )


def refuse_not_finite(logs: Mapping[str, float], step: int) -> None:
    """Raise UserError that names the terms which are NaN or infinite."""
    broken = [f"{name} = {value}" for name, value in logs.items() if not math.isfinite(value)]
    if broken:
        raise UserError(
            f"Training broke down before step {step}: {', '.join(broken)}. Lower training.learning_rate, set "
            "training.max_grad_norm, or use bf16 in place of fp16; if it happens at once, the teacher or the data hold "
            "NaN. Checkpoints on disk are untouched."
        )
