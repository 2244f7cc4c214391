"""The parts of a diagnosis by name, and making several of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from layerdistill.core.errors import UserError, one_of
from layerdistill.diagnose.geometry import find_angles, find_gradients
from layerdistill.diagnose.profiles import find_clusterability, find_importance, find_similarity
from layerdistill.diagnose.states import LeftOut
from layerdistill.diagnose.subject import Subject
from layerdistill.diagnose.tables import Finding

PARTS: dict[str, Callable[[Subject], Finding]] = {
    "angles": find_angles,
    "gradients": find_gradients,
    "similarity": find_similarity,
    "importance": find_importance,
    "clusterability": find_clusterability,
}
"""Every part, in the order in which they are shown."""


def chosen_parts(given: str | None) -> list[str]:
    """Return the parts named in a list with commas, all for None; raises UserError for a name that is none."""
    if given is None:
        return list(PARTS)
    names = [name.strip() for name in given.split(",") if name.strip()]
    problems = [one_of("--parts", name, list(PARTS)) for name in names if name not in PARTS]
    if problems or not names:
        raise UserError(*(problems or [f"--parts names nothing. Give some of: {', '.join(PARTS)}."]))
    return [name for name in PARTS if name in names]


def find_parts(
    subject: Subject, names: Sequence[str], say: Callable[[str], None]
) -> tuple[dict[str, Finding], dict[str, str]]:
    """Return what the named parts found, and why the others could not be made; `say` hears which part is next."""
    findings: dict[str, Finding] = {}
    left_out: dict[str, str] = {}
    for name in names:
        say(name)
        try:
            findings[name] = PARTS[name](subject)
        except LeftOut as reason:
            left_out[name] = str(reason)
    return findings, left_out
