"""Imports during which nothing is collected, and what they made is not looked at again."""

from __future__ import annotations

import gc

import pytest

from layerdistill.core.quick_imports import quick_imports


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was_and_what_is_there_is_kept_out(enabled: bool) -> None:
    gc.enable() if enabled else gc.disable()
    try:
        before = gc.get_freeze_count()
        with quick_imports():
            assert not gc.isenabled()
            kept = [[] for _ in range(1000)]
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() >= before + len(kept)
    finally:
        gc.enable()
