"""Errors that tell a user what is wrong, what was given, what is allowed, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LayerDistillError(Exception):
    """Base class of every error that this package raises on purpose."""


class UserError(LayerDistillError):
    """The user's input is wrong; the command line ends with status 2 and prints only the message.

    `problems` holds one complete sentence (or short paragraph) per problem, so that a recipe with five mistakes is
    reported once, not five times.
    """

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = problems
        super().__init__("\n".join(problems))


class Interrupted(LayerDistillError):
    """The user stopped a run and its state was saved; the command line ends with status 130."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest allowed word, or an empty string when nothing is close."""
    matches = difflib.get_close_matches(str(given), [str(word) for word in allowed], n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def one_of(what: str, given: object, allowed: Sequence[str]) -> str:
    """Return the standard sentence for a value outside a closed list of words."""
    listed = ", ".join(allowed)
    return f"{what} is {given!r}, but must be one of: {listed}.{did_you_mean(str(given), allowed)}"
