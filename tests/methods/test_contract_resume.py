"""Every method x every fitting family: stopped inside a step and started again, a run ends with the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import PAIRS, distilled

from layerdistill.train.trainer import StageTrainer

QUICK = ("bert", "gpt2")
"""Families whose runs are stopped in `make test`; the others are in `make test-all`."""

CASES = [
    pytest.param(method, family, id=f"{method}-{family}", marks=[] if family in QUICK else [pytest.mark.slow])
    for method, family in PAIRS
]


@pytest.mark.parametrize(("method", "family"), CASES)
def test_stopped_at_any_step_and_resumed(
    method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = distilled(method, family, tmp_path / "whole", 9)
    steps = len(trained_steps(tmp_path / "whole"))
    left = [2 * steps // 3]
    step = StageTrainer.training_step

    def dying(self: StageTrainer, *args: Any, **options: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise SystemExit(9)
        return step(self, *args, **options)

    monkeypatch.setattr(StageTrainer, "training_step", dying)
    with pytest.raises(SystemExit):
        distilled(method, family, tmp_path / "again", 9)
    left[0] = -1
    _, resumed = distilled(method, family, tmp_path / "again", 9)
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def trained_steps(folder: Path) -> list[tuple[str, int]]:
    """Every optimisation step of a run: the last step of each of its stages tells how many there were."""
    last: dict[str, int] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line)
        last[found["stage"]] = max(found["step"], last.get(found["stage"], 0))
    return [(stage, step) for stage, count in last.items() for step in range(count)]
