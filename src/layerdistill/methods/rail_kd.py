"""RAIL-KD: a random subset of teacher layers each epoch, compared through pooled and mapped hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from layerdistill.core.types import Pair, RunContext, Stage, StagePreview
from layerdistill.matching.layer_map import DRAWN
from layerdistill.methods.matched import (
    LayerName,
    MatchedConfig,
    Strategy,
    build_maps,
    matched_problems,
    prediction_terms,
)
from layerdistill.methods.pooled_term import Form, PooledTerm
from layerdistill.methods.preview import preview_stages
from layerdistill.methods.weights import HiddenWeights

THIRD = 1 / 3
"""The weight of each of the three terms in LoRAILD's runs of RAIL-KD."""


class RailWeights(HiddenWeights):
    """Coefficients of the three terms; a third each, as in LoRAILD's runs of RAIL-KD."""

    task: float = Field(THIRD, ge=0)
    """Multiplies the loss on the labels."""

    logits: float = Field(THIRD, ge=0)
    """Multiplies the loss between the two models' logits (already multiplied by temperature squared)."""

    hidden: float = Field(THIRD, ge=0)
    """Multiplies the loss between mapped hidden states, after it was averaged (or summed) over the matched pairs."""


class RailKdConfig(MatchedConfig):
    """`method: {name: rail_kd, ...}`."""

    name: Literal["rail_kd"] = "rail_kd"

    form: Form = "layerwise"
    """layerwise: one loss per matched pair; concatenated: one loss on the matched layers laid end to end."""

    projection_size: PositiveInt = 32
    """Width that both sides are mapped to; LoRAILD's runs have 8, 32, 64 and 128."""

    train_teacher_maps: bool = True
    """Whether the teacher's maps are trained, as in the paper; frozen, they cannot give the match away."""

    squared: bool = True
    """Whether the distance of the unit vectors is squared (the paper) or not (LoRAILD's released code)."""

    include_padding: bool = False
    """Whether the average over tokens counts padding too, as in LoRAILD's released code."""

    layer_map: Strategy | list[tuple[LayerName, LayerName]] = "in_order_random"
    """A strategy, or explicit [student, teacher] pairs; layer 0 is the embedding output, k the output of block k."""

    redraw: Literal["run", "epoch", "batch"] = "epoch"
    """How often the random strategies draw a new map; `run` where the map is not random and nothing is given."""

    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both models; the loss is multiplied by its square."""

    weights: RailWeights = RailWeights()
    """Coefficients of the three terms."""

    @model_validator(mode="before")
    @classmethod
    def _redraw_only_what_is_drawn(cls, given: Any) -> Any:
        if isinstance(given, dict) and "redraw" not in given and given.get("layer_map", DRAWN[0]) not in DRAWN:
            return {**given, "redraw": "run"}
        return given


class RandomIntermediateLayers:
    """Knowledge distillation plus a distance between pooled and mapped hidden states, its teacher layers drawn anew.

    Haidar et al. 2022 (RAIL-KD, https://arxiv.org/abs/2109.10164), after the re-implementation in
    LoRAILD's released code (https://github.com/TKC002/LoRAILD), whose pooling over padding and unsquared distance are
    `include_padding: true` and `squared: false`. Deviations: real tokens only; maps start from N(0, 1 / width) and a
    bias of 0. The KL's probabilities come from logits divided by T; their code divides the probabilities.
    """

    name = "rail_kd"
    summary = "kd plus pooled hidden states of a random subset of teacher layers, redrawn each epoch"
    Config = RailKdConfig
    one_stage = True
    grows_student = False

    def stages(self, pair: Pair, config: RailKdConfig, context: RunContext | None = None) -> Iterator[Stage]:
        """One stage with the task, logits and hidden terms."""
        hidden = PooledTerm(
            build_maps(config, pair),
            {stack: (width, pair.teacher_width[stack]) for stack, width in pair.student_width.items()},
            config.weights.hidden,
            config.projection_size,
            config.form,
            train_teacher_maps=config.train_teacher_maps,
            squared=config.squared,
            include_padding=config.include_padding,
            reduce=config.reduce,
            seed=pair.seed,
        )
        yield Stage("distill", pair.student, nn.ModuleList([*prediction_terms(config, pair), hidden]))

    def preview(self, pair: Pair, config: RailKdConfig) -> list[StagePreview]:
        """The one stage; its layer map is the first of many where one is drawn again and again."""
        previews = preview_stages(self.stages(pair, config))
        if config.redraw == "run":
            return previews
        note = f"The layer map is drawn anew for each {config.redraw}; this is the first."
        return [replace(preview, notes=(*preview.notes, note)) for preview in previews]

    def problems(self, config: RailKdConfig, pair: Pair) -> list[str]:
        """A layer map out of range, or a loss that does not fit."""
        return matched_problems(config, pair)


METHOD = RandomIntermediateLayers()
