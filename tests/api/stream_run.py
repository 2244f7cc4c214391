"""One distillation on a stream of toy texts, as a script that a launcher can start several times at once."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import tiny_model
from toy import toy_dataset
from toy_recipe import toy_tokenizer

import layerdistill as ld


def distilled(folder: Path, batch_size: int, mode: str) -> dict[str, torch.Tensor]:
    """Train on 30 texts for two passes and a half, plain steps, and return the student's weights."""
    teacher, student = (
        tiny_model("bert", "sequence-classification", num_layers=blocks, seed=blocks) for blocks in (4, 2)
    )
    args = ld.LayerDistillationConfig(
        output_dir=str(folder), per_device_train_batch_size=batch_size, max_steps=19, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    stream = toy_dataset("sequence-classification", size=30).to_iterable_dataset()
    cache = ld.CacheConfig(mode, "float32", folder.parent / "cache")
    ld.distill(teacher, student, stream, method="ild", args=args, processing_class=toy_tokenizer(), cache=cache)
    return student.state_dict()


if __name__ == "__main__":
    weights = distilled(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    if torch.distributed.get_rank() == 0:
        save_file(weights, Path(sys.argv[1]) / "student.safetensors")
