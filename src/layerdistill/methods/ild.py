"""Intermediate-layer distillation: projected hidden states, matched layer by layer, beside knowledge distillation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

from torch import nn

from layerdistill.core.types import Pair, RunContext, Stage, StagePreview
from layerdistill.matching import (
    Projections,
    cosine_loss,
    layer_norm_mse,
    masked_mse,
    normalised_mse,
    padded_normalised_mse,
    projected_mse,
)
from layerdistill.matching.projection import ProjectionKind
from layerdistill.methods.hidden_term import Distance, HiddenTerm, ProjectedDistance
from layerdistill.methods.matched import TokensConfig, build_maps, matched_problems, prediction_terms
from layerdistill.methods.preview import preview_stages

DISTANCES: dict[str, Distance] = {
    "mse": masked_mse,
    "relative_mse": partial(masked_mse, divide_by_teacher=True),
    "cosine": cosine_loss,
    "normalised_mse": normalised_mse,
    "layer_norm_mse": layer_norm_mse,
    "padded_normalised_mse": padded_normalised_mse,
}
PROJECTED: dict[str, ProjectedDistance] = {
    "mse": projected_mse,
    "relative_mse": partial(projected_mse, divide_by_teacher=True),
}
"""Distances that are computed together with a linear projection."""
SEES_PADDING = ("padded_normalised_mse",)
"""Distances that count padding, as the released code that they follow does."""
TRAINED: set[ProjectionKind] = {"linear", "orthogonal"}
"""Kinds of projections that can have a bias."""


class IldConfig(TokensConfig):
    """`method: {name: ild, ...}`."""

    name: Literal["ild"] = "ild"

    distance: Literal["mse", "relative_mse", "cosine", "normalised_mse", "layer_norm_mse", "padded_normalised_mse"] = (
        "mse"
    )
    """mse: mean over hidden and real tokens; relative_mse: divided by the teacher's mean square; cosine: 1 - cos;
    normalised_mse: of unit vectors; layer_norm_mse: after each whole layer was brought to mean 0 and variance 1;
    padded_normalised_mse: as released for Qwen3, over padding too."""

    projection: Literal["auto", "identity", "linear", "frozen_random", "orthogonal"] = "auto"
    """How student states reach the teacher's width; auto is identity at equal width, else linear."""

    shared_projection: bool = False
    """Whether all pairs of a stack use one projection (TinyBERT's way) or each student layer has its own."""

    projection_bias: bool = False
    """Whether trained projections have a bias, as the linear baseline of the CKA authors has."""


class IntermediateLayerDistillation:
    """Knowledge distillation plus a distance between projected student states and teacher states of matched layers.

    Follows the common form of "layer selection" studies (https://arxiv.org/abs/2502.04499) and TinyBERT
    (https://arxiv.org/abs/1909.10351). Deviations: per-element mean over real tokens, averaged over pairs; projections
    trainable, bias-free and one per layer.
    """

    name = "ild"
    summary = "kd plus projected hidden states, matched layer by layer"
    Config = IldConfig
    one_stage = True
    grows_student = False

    def stages(self, pair: Pair, config: IldConfig, context: RunContext | None = None) -> Iterator[Stage]:
        """One stage with the task, logits and hidden terms."""
        maps = build_maps(config, pair)
        projections = {}
        for layer_map in maps:
            stack = layer_map.stack
            widths = pair.student_width[stack], pair.teacher_width[stack]
            kind = projection_kind(config, *widths)
            layers = sorted({student for student, _ in layer_map.refs_at(0, 0)})
            projections[stack] = Projections(
                kind,
                layers,
                *widths,
                shared=config.shared_projection,
                bias=config.projection_bias,
                seed=pair.seed,
            )
        hidden = HiddenTerm(
            maps,
            DISTANCES[config.distance],
            config.weights.hidden,
            projections,
            config.reduce,
            sees_padding=config.distance in SEES_PADDING,
            projected=PROJECTED.get(config.distance),
            dtype=config.products,
        )
        yield Stage("distill", pair.student, nn.ModuleList([*prediction_terms(config, pair), hidden]))

    def preview(self, pair: Pair, config: IldConfig) -> list[StagePreview]:
        """The one stage."""
        return preview_stages(self.stages(pair, config))

    def problems(self, config: IldConfig, pair: Pair) -> list[str]:
        """A layer map out of range, a loss that does not fit, or a projection that fits neither widths nor bias."""
        problems = matched_problems(config, pair)
        unequal = [
            stack or "the model"
            for stack in pair.student_width
            if pair.student_width[stack] != pair.teacher_width.get(stack)
        ]
        if config.projection == "identity" and unequal:
            problems.append(
                f"method.projection is 'identity', but the student is {list(pair.student_width.values())} wide and the "
                f"teacher {list(pair.teacher_width.values())}. Write projection: linear, or method name: cka, which "
                "needs no projection."
            )
        kinds = {
            projection_kind(config, width, pair.teacher_width[stack])
            for stack, width in pair.student_width.items()
            if stack in pair.teacher_width
        }
        if config.projection_bias and not kinds <= TRAINED:
            problems.append(
                f"method.projection_bias is true, but method.projection is {config.projection!r} and no projection is "
                "trained between these widths, so there is no bias. Write projection: linear, or leave the bias out."
            )
        return problems


def projection_kind(config: IldConfig, student_width: int, teacher_width: int) -> ProjectionKind:
    """Return the projection between two widths: what the config says, and for `auto` the least that fits."""
    if config.projection != "auto":
        return config.projection
    return "identity" if student_width == teacher_width else "linear"


METHOD = IntermediateLayerDistillation()
