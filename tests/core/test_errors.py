"""Messages: one complete sentence per problem, and a suggestion only where something is close."""

from __future__ import annotations

import pytest

from layerdistill.core.errors import Interrupted, LayerDistillError, UserError, did_you_mean, one_of


def test_a_user_error_keeps_its_problems_apart() -> None:
    error = UserError("The first is wrong.", "The second too.")
    assert error.problems == ("The first is wrong.", "The second too.")
    assert str(error) == "The first is wrong.\nThe second too."


def test_what_is_the_users_fault_is_not_an_interruption() -> None:
    assert issubclass(UserError, LayerDistillError)
    assert issubclass(Interrupted, LayerDistillError)
    assert not issubclass(Interrupted, UserError)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("foward", " Did you mean 'forward'?"), ("revers", " Did you mean 'reverse'?"), ("xyz", ""), ("", "")],
)
def test_only_what_is_close_is_suggested(given: str, expected: str) -> None:
    assert did_you_mean(given, ["forward", "reverse"]) == expected


def test_a_closed_list_is_listed_with_what_was_given() -> None:
    sentence = one_of("method.name", "ckd", ["kd", "cka"])
    assert sentence.startswith("method.name is 'ckd', but must be one of: kd, cka.")
    assert sentence.endswith("Did you mean 'kd'?") or sentence.endswith("Did you mean 'cka'?")
    assert one_of("seed", 3, ["a"]) == "seed is 3, but must be one of: a."
