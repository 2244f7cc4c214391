"""Rows set aside for choosing (layers, heads, widths): never trained on, never the split that is reported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from datasets import Dataset
from pydantic import PositiveInt

from layerdistill.core.config import SectionConfig
from layerdistill.core.errors import UserError
from layerdistill.core.seeds import random_for

CALIBRATION = "calibration"
"""The name of the split that `set_aside` adds."""

MOST_SHARED = 0.1
"""The share of the calibration rows that may also stand in the reported split; those that do are left out."""


class CalibrationConfig(SectionConfig):
    """Which rows a method chooses by; they are taken out of the training data."""

    split: Literal["train", "validation"] = "train"
    """Where the rows come from; validation only where another split (data.test) is the reported one."""

    examples: PositiveInt = 256
    """How many rows, drawn at random with the recipe's seed."""


def set_aside(datasets: Mapping[str, Dataset], config: CalibrationConfig, seed: int) -> dict[str, Dataset]:
    """Return tokenised splits with one more, `calibration`, whose rows are no longer in the training data.

    Rows whose tokens are also those of a reported row are left out. Raises UserError for the reported split itself,
    for one that shares more than a tenth of its drawn rows with it, and where too few rows would be left.
    """
    reported = "test" if "test" in datasets else "validation"
    if config.split == reported:
        raise UserError(
            f"method.calibration.split is {config.split!r}, which is the split that is reported: what is chosen on it "
            "cannot be judged on it. Use split: train, or give data.test."
        )
    if config.split not in datasets:
        raise UserError(f"method.calibration.split is {config.split!r}, but the recipe has no data.{config.split}.")
    rows = datasets[config.split]
    if not isinstance(rows, Dataset):
        raise UserError(
            f"method.calibration draws rows of {config.split}, but that is a {type(rows).__name__}, which cannot be "
            "drawn from. Pass a datasets.Dataset, or take the rows from another split (method.calibration.split)."
        )
    if config.split == "train" and len(rows) <= config.examples:
        raise UserError(
            f"method.calibration.examples is {config.examples}, but there are only {len(rows)} training rows, and none "
            "would be left to train on. Take fewer."
        )
    chosen = sorted(random_for(seed, "calibration").sample(range(len(rows)), min(config.examples, len(rows))))
    seen = {tuple(ids) for ids in datasets[reported]["input_ids"]} if reported in datasets else set()
    kept = [row for row in chosen if tuple(rows[row]["input_ids"]) not in seen]
    if len(chosen) - len(kept) > MOST_SHARED * len(chosen):
        raise UserError(
            f"method.calibration: {len(chosen) - len(kept)} of {len(chosen)} rows drawn from data.{config.split} also "
            f"stand in data.{reported}, which is reported. Give splits that do not overlap."
        )
    result = {**datasets, CALIBRATION: rows.select(kept)}
    if config.split == "train":
        left = set(range(len(rows))) - set(chosen)
        result["train"] = rows.select(sorted(left))
    return result
