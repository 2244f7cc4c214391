"""Layer-wise knowledge distillation of transformer language models: one recipe, one trainer, one fair comparison."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

HOMES = {
    "LayerDistillationConfig": "train.config",
    "LayerDistillationTrainer": "api",
    "DistillResult": "api",
    "distill": "api",
    "CacheConfig": "teacher_cache",
    "load_recipe": "recipe",
    "Recipe": "recipe",
    "run": "runner",
    "RunResult": "run_folder",
    "load_student": "models",
    "save_student": "train.trainer",
    "make_student": "models",
    "capture": "signals",
    "layer_map": "matching",
    "LayerMap": "matching",
    "UserError": "core.errors",
}
"""Public names and the modules they live in; loaded when first used, so that `import layerdistill` costs nothing.

No module may have the name of a public function: importing it would put the module in the function's place. That is
why the spine is `runner.py` and the hooks live in `signals/`.
"""

MODULES = ("matching",)
"""Public modules."""

__all__ = [*HOMES, *MODULES, "__version__"]  # noqa: PLE0604

if TYPE_CHECKING:
    from layerdistill import matching
    from layerdistill.api import DistillResult, LayerDistillationTrainer, distill
    from layerdistill.core.errors import UserError
    from layerdistill.matching import LayerMap, layer_map
    from layerdistill.models import load_student, make_student
    from layerdistill.recipe import Recipe, load_recipe
    from layerdistill.run_folder import RunResult
    from layerdistill.runner import run
    from layerdistill.signals import capture
    from layerdistill.teacher_cache import CacheConfig
    from layerdistill.train.config import LayerDistillationConfig
    from layerdistill.train.trainer import save_student


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return import_module(f"layerdistill.{name}")
    if name not in HOMES:
        raise AttributeError(f"module 'layerdistill' has no attribute {name!r}")
    return getattr(import_module(f"layerdistill.{HOMES[name]}"), name)
