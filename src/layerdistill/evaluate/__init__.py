"""How good a model is (metrics, with every prediction kept) and what it costs (parameters, MACs, time, memory)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

HOMES = {
    "EvaluationConfig": "config",
    "f1_problems": "config",
    "metric_problems": "config",
    "chance_levels": "chance",
    "EvaluationResult": "evaluator",
    "evaluate_model": "evaluator",
    "metrics_in_training": "evaluator",
    "predict": "evaluator",
    "scores": "evaluator",
    "kept_predictions": "prediction_store",
    "compute_metrics": "metrics",
    "save_predictions": "predictions",
    "measure_cost": "cost",
    "measure_costs": "cost",
}
"""Public names and their modules; loaded when first used, because reports and recipes read `config` without torch."""

__all__ = [
    "EvaluationConfig",
    "EvaluationResult",
    "chance_levels",
    "compute_metrics",
    "evaluate_model",
    "f1_problems",
    "kept_predictions",
    "measure_cost",
    "measure_costs",
    "metric_problems",
    "metrics_in_training",
    "predict",
    "save_predictions",
    "scores",
]

if TYPE_CHECKING:
    from layerdistill.evaluate.chance import chance_levels
    from layerdistill.evaluate.config import EvaluationConfig, f1_problems, metric_problems
    from layerdistill.evaluate.cost import measure_cost, measure_costs
    from layerdistill.evaluate.evaluator import EvaluationResult, evaluate_model, metrics_in_training, predict, scores
    from layerdistill.evaluate.metrics import compute_metrics
    from layerdistill.evaluate.prediction_store import kept_predictions
    from layerdistill.evaluate.predictions import save_predictions


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'layerdistill.evaluate' has no attribute {name!r}")
    return getattr(import_module(f"layerdistill.evaluate.{HOMES[name]}"), name)
