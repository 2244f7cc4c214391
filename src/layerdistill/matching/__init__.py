"""The mathematics: pure functions of tensors that any training loop can use; imports torch and `core` only."""

from layerdistill.core.types import TopK, TopTokens
from layerdistill.matching.angles import angle_null, layer_angles
from layerdistill.matching.cka import (
    CkaStatistics,
    cka_from_statistics,
    cka_loss,
    cka_statistics,
    cka_target,
    linear_cka,
)
from layerdistill.matching.hidden import (
    cosine_loss,
    layer_norm_mse,
    masked_mse,
    normalised_mse,
    padded_normalised_mse,
)
from layerdistill.matching.layer_map import LayerMap, MapRow, layer_map, map_rows
from layerdistill.matching.logits import (
    binary_cross_entropy,
    binary_kl,
    cross_entropy,
    forward_kl,
    js_divergence,
    logit_mse,
    mean_squared_error,
    next_token_labels,
    reverse_kl,
    soft_cross_entropy,
)
from layerdistill.matching.pooled import direction_distance, mean_over_tokens
from layerdistill.matching.projected import LinearMap, projected_mse
from layerdistill.matching.projection import Projections
from layerdistill.matching.top_k import likeliest_tokens, top_k_divergence
from layerdistill.matching.vocabulary_head import VocabularyHead
from layerdistill.matching.vocabulary_loss import vocabulary_losses

__all__ = [
    "CkaStatistics",
    "LayerMap",
    "LinearMap",
    "MapRow",
    "Projections",
    "TopK",
    "TopTokens",
    "VocabularyHead",
    "angle_null",
    "binary_cross_entropy",
    "binary_kl",
    "cka_from_statistics",
    "cka_loss",
    "cka_statistics",
    "cka_target",
    "cosine_loss",
    "cross_entropy",
    "direction_distance",
    "forward_kl",
    "js_divergence",
    "layer_angles",
    "layer_map",
    "layer_norm_mse",
    "likeliest_tokens",
    "linear_cka",
    "logit_mse",
    "map_rows",
    "masked_mse",
    "mean_over_tokens",
    "mean_squared_error",
    "next_token_labels",
    "normalised_mse",
    "padded_normalised_mse",
    "projected_mse",
    "reverse_kl",
    "soft_cross_entropy",
    "top_k_divergence",
    "vocabulary_losses",
]
