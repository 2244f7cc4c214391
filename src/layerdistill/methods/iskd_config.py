"""The method section of an iskd recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from layerdistill.core.config import SectionConfig
from layerdistill.data import CalibrationConfig
from layerdistill.methods.iskd_order import Order
from layerdistill.methods.predictions import PredictionsConfig
from layerdistill.methods.replacing import CompactInit
from layerdistill.methods.weights import HiddenWeights


class CompactConfig(SectionConfig):
    """What a compact block looks like."""

    hidden_size: PositiveInt | None = None
    """Width of the inner blocks; null is a sixth of the model's, in whole heads of the model's head size."""

    num_inner_blocks: PositiveInt = 2
    """Blocks inside one compact block; the model gets deeper by this number less one for each block replaced."""

    num_attention_heads: PositiveInt | None = None
    """Heads of the inner blocks; null keeps the model's head size."""

    intermediate_size: PositiveInt | None = None
    """Feed-forward width of the inner blocks; null keeps the model's proportion to the hidden size."""

    activation: Literal["relu", "none"] = "relu"
    """What follows the projection down."""

    position_table: bool = True
    """Whether the inner blocks of a model with learned positions get a table of their own; rotary positions stay."""

    dropout: float | None = Field(None, ge=0, lt=1)
    """Every dropout of the inner blocks, and on what enters them; null is the model's own."""


class IskdWeights(HiddenWeights):
    """Coefficients of the three terms; the paper's code has the first alone."""

    task: float = Field(0.5, ge=0)
    """Multiplies the loss on the labels."""

    logits: float = Field(0.5, ge=0)
    """Multiplies the loss between the two models' logits (already multiplied by temperature squared)."""


class IskdConfig(PredictionsConfig):
    """`method: {name: iskd, ...}`."""

    name: Literal["iskd"] = "iskd"

    order: Order | list[int] = "alternate"
    """Which block is replaced first, second, ...: a rule, or a list of blocks counted from 0."""

    importance: Literal["block_influence", "one_out_loss", "one_out_kl", "angular_distance", "cka_redundancy"] = (
        "block_influence"
    )
    """The criterion of `order: importance`; the least important block is replaced first."""

    calibration: CalibrationConfig | None = None
    """The rows by which `order: importance` chooses; null sets none aside (with that order: its defaults)."""

    num_replaced: PositiveInt | None = None
    """How many blocks are replaced; null is half of them, or as many as `order` lists."""

    block: CompactConfig = CompactConfig()
    """Shape of the compact blocks; everything left out follows from the model."""

    init: CompactInit = "warmup"
    """`paper`: Xavier-uniform projections; `zero_up`: it hands its input on at first; `warmup`: that, then fitted."""

    warmup_steps: PositiveInt = 200
    """Steps of fitting a new block to the one it replaces, before it takes its place (`init: warmup`)."""

    schedule: Literal["step", "bernoulli", "blend"] = "step"
    """`step`: one block per stage, at once; `blend`: one per stage, gradually; `bernoulli`: all, at random, more and
    more often, and then a stage with all replaced."""

    ramp_steps: PositiveInt = 500
    """Steps in which `blend` goes from the old block to the new one."""

    rate_start: float = Field(0.3, ge=0, le=1)
    """Probability of the new block at the first step of `bernoulli`."""

    rate_slope: float = Field(6e-4, ge=0)
    """By how much that probability rises each step, up to 1."""

    trained: Literal["all", "new"] = "all"
    """Whether all parameters train (blocks on their way out excepted), or those of compact blocks only."""

    new_learning_rate: PositiveFloat = 1e-4
    """Learning rate of the block that a stage puts in; all others have training.learning_rate."""

    weights: IskdWeights = IskdWeights()
    """Coefficients of the three terms; hidden is a relative mean square at the outputs of the replaced blocks."""

    @model_validator(mode="before")
    @classmethod
    def _rows_to_choose_by(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("order") == "importance" and given.get("calibration") is None:
            return {**given, "calibration": {}}
        return given
