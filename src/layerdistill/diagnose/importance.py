"""How much each block of a model matters, by every criterion that needs no training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from layerdistill.core.errors import UserError
from layerdistill.core.types import Batch
from layerdistill.diagnose.states import LeftOut
from layerdistill.signals.importance import IMPORTANCE


def importance_profile(
    model: nn.Module, task: str, batches: Sequence[Batch]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return one number per block, from block 0, for each criterion of `IMPORTANCE`; and why others were left out.

    Each criterion has a scale of its own; higher is more important. Raises LeftOut when no criterion fits the model.
    """
    found: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    for name, criterion in IMPORTANCE.items():
        try:
            found[name] = criterion(model, task, batches)
        except UserError as error:
            reasons[name] = str(error)
    if not found:
        raise LeftOut("; ".join(dict.fromkeys(reasons.values())))
    return found, reasons
