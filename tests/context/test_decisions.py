"""What a run decides is decided once, by the main process, for all processes and for a resumed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from rich.console import Console
from layerdistill.context import LiveContext
from layerdistill.train.stage import StageInput

folder = Path(sys.argv[1])
rank = PartialState(cpu=True).process_index
context = LiveContext(StageInput("causal-lm", {}, None, None, {}, 0, folder, Console(quiet=True)), ["perplexity"])
chosen = context.decide("blocks", lambda: [rank, 7])
again = context.decide("blocks", lambda: ["chosen twice"])
(folder / f"process-{rank}.json").write_text(json.dumps([chosen, again]))
"""


def test_two_processes_that_would_choose_otherwise_take_the_main_ones_choice(tmp_path: Path) -> None:
    script = tmp_path / "decide.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert json.loads((tmp_path / f"process-{rank}.json").read_text()) == [[0, 7], [0, 7]]
    assert json.loads((tmp_path / "decisions.json").read_text()) == {"blocks": [0, 7]}
