"""Every arm by its name; imports neither torch nor any of the tools, so that the parent process stays light."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

MEASURED = ("W1", "W1-padded", "W2", "W3")
STUDIED = (*MEASURED, "W4-kd", "W4-cosine")
"""What an arm must do to take part in the study W4, which is computed from its parts."""
WITH_HIDDEN = ("W1", "W2", "W4-cosine")
"""The works of which is said what their hidden terms cost."""


@dataclass(frozen=True)
class Arm:
    """One way to do the works.

    `made_by` is `module:class` below `benchmarks.arms`. `package` is what is installed into an environment of its own;
    without one the arm runs where the benchmark runs. `tolerance` is how far its first losses may be from the
    reference's, relatively. `note` says what it does differently.
    """

    name: str
    made_by: str
    works: tuple[str, ...] = MEASURED
    package: str | None = None
    tolerance: float = 1e-3
    note: str = ""

    def load(self) -> Any:
        """Import the class; fails where its tool is not installed."""
        module, _, name = self.made_by.partition(":")
        return getattr(import_module(f"benchmarks.arms.{module}"), name)


REFERENCE = Arm("naive loop", "naive:Naive", STUDIED)
FLOOR = Arm("floor", "naive:Floor", note="the student alone, padded, the teacher's outputs in memory")
ARMS = (
    REFERENCE,
    FLOOR,
    Arm("layerdistill", "layerdistill:Live", STUDIED, note="batches grouped by length, its default"),
    Arm(
        "layerdistill, best", "layerdistill:BestLive", STUDIED, tolerance=0.05,
        note="teacher and the products of hidden terms in bfloat16 where that is fast, batches grouped by length",
    ),
    Arm(
        "layerdistill, first pass", "layerdistill:FirstPass", STUDIED, tolerance=0.05,
        note="the same, and what the teacher says is kept on the disk",
    ),
    Arm(
        "layerdistill, cached", "layerdistill:Cached", STUDIED, tolerance=0.05,
        note="the same teacher, read from the disk",
    ),
    Arm(
        "layerdistill, cached, float32", "layerdistill:CachedFloat32", WITH_HIDDEN, tolerance=0.05,
        note="the same, the products of hidden terms in float32",
    ),
    Arm(
        "layerdistill, cached, mixed lengths", "layerdistill:CachedMixed", WITH_HIDDEN, tolerance=0.05,
        note="the same teacher; batches as the naive loop's, packed",
    ),
    Arm("Trainer subclass", "trainer_subclass:TrainerSubclass", STUDIED),
    Arm(
        "TextBrewer", "textbrewer:TextBrewer", package="textbrewer",
        note="soft cross-entropy in place of the KL (the same gradient); projections with a bias",
    ),
    Arm(
        "torchdistill", "torchdistill:TorchDistill", package="torchdistill",
        note="its losses get no mask: the hidden terms count padding",
    ),
    Arm(
        "ModelOpt", "modelopt:ModelOpt", package="nvidia-modelopt",
        note="its losses get no mask: the hidden terms count padding, the KL of a language model each row's last "
        "position; weights must add up to 1",
    ),
    Arm("TRL, GKD loss", "trl:Gkd", ("W3",), package="trl", note="TRL has no hidden terms: those of the naive loop"),
    Arm(
        "TRL, chunked loss", "trl:Chunked", ("W3",), package="trl",
        note="hidden terms and the loss on the labels are those of the naive loop",
    ),
)  # fmt: skip


def find_arm(name: str) -> Arm:
    """Return the arm of that name; raises StopIteration for none."""
    return next(arm for arm in ARMS if arm.name == name)


def packages() -> list[str]:
    """Return the packages that the arms need, each once."""
    return list(dict.fromkeys(arm.package for arm in ARMS if arm.package is not None))
