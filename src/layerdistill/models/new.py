"""Models that no checkpoint holds: a transformers configuration with random weights."""

from __future__ import annotations

import copy
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from layerdistill.core.errors import UserError, did_you_mean
from layerdistill.core.seeds import seeded
from layerdistill.models.tasks import class_for, set_task


def new_config(architecture: dict[str, Any], vocab_size: int) -> PretrainedConfig:
    """Return the configuration of a model to be trained from random weights; `vocab_size` is used where none is given.

    Raises UserError for an unknown `model_type` or fields that its configuration does not have.
    """
    fields = {"vocab_size": vocab_size, **architecture}
    model_type = str(fields.pop("model_type", None))
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"teacher.architecture.model_type is {model_type!r}, which is no model type of transformers."
            f"{did_you_mean(model_type, CONFIG_MAPPING)}"
        )
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), *config_class.attribute_map}
    problems = [
        f"teacher.architecture.{name} is not a field of a {model_type} configuration.{did_you_mean(name, known)}"
        for name in fields
        if name not in known
    ]
    if problems:
        raise UserError(*problems)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"teacher.architecture is refused by transformers: {error}") from error


def new_model(config: PretrainedConfig, task: str, num_labels: int | None, seed: int) -> PreTrainedModel:
    """Return a float32 model with the head for `task` and random weights drawn from `seed`, in eval mode."""
    config = copy.deepcopy(config)
    set_task(config, task, num_labels)
    with seeded(seed, "model"):
        return class_for(task).from_config(config, dtype="float32").eval()
