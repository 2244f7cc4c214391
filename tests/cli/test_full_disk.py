"""No room for a checkpoint: status 2, the message says so, and what was there before is whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml
from toy_recipe import toy_recipe

LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = ["layerdistill", *sys.argv[2:]]
from layerdistill.cli import main
main()
"""


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "kd")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # A file may have 20 kB here; the student's weights need more, the recipe and the logs less.
    limited = [sys.executable, "-c", LIMITED, "20000", "train", str(tmp_path / "recipe.yaml")]
    failed = subprocess.run(limited, capture_output=True, text=True, check=False, env=environment)
    assert failed.returncode == 2, failed.stderr[-3000:]
    assert "cannot be written" in failed.stderr
    assert "Traceback" not in failed.stderr
    checkpoints = tmp_path / "run" / "checkpoints" / "distill"
    assert not list(checkpoints.glob("checkpoint-*")), "half a checkpoint must not look like one"
    roomy = [sys.executable, "-m", "layerdistill", "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(roomy, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
