"""Ctrl-C before training begins, where no checkpoint can be made."""

from __future__ import annotations

import sys

import pytest

from layerdistill import cli, runner


def test_ctrl_c_while_a_run_is_prepared_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["layerdistill", "train", "recipe.yaml"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 130
    assert "Give the same command again" in capsys.readouterr().err
