"""A stream in two processes: each takes its share of every step, and keeps what the teacher says of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stream_run import distilled

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_processes_train_the_student_of_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(Path(__file__).with_name("stream_run.py")), str(tmp_path / "two"), "2", "fill",
        ],
        capture_output=True, text=True, check=False, timeout=240,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": str(TESTS),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "two" / "student.safetensors")
    expected = distilled(tmp_path / "one", 4, "require")  # what the two kept is all there is to read
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0, msg=name)
