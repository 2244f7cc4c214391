"""How well the examples of each layer fall into clusters that are the classes (the analysis of LoRAILD's authors)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import metrics
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.core.types import Batch, LayerRef, StackName
from layerdistill.diagnose.states import LeftOut, layers_of
from layerdistill.models import evaluating
from layerdistill.signals import run_model

Features = NDArray[np.float32]
Labels = NDArray[np.integer[Any]]

SHUFFLES = 200
"""Random orders of the labels that say what agreement chance gives."""

EXTERNAL: dict[str, Callable[..., float]] = {
    "ari": metrics.adjusted_rand_score,
    "ami": metrics.adjusted_mutual_info_score,
    "v_measure": metrics.v_measure_score,
    "fowlkes_mallows": metrics.fowlkes_mallows_score,
}
"""Agreement of clusters and labels, 1 at best. The first two are corrected for chance (0 for clusters at random)."""

INTERNAL: dict[str, Callable[..., float]] = {
    "silhouette": metrics.silhouette_score,
    "calinski_harabasz": metrics.calinski_harabasz_score,
    "davies_bouldin": metrics.davies_bouldin_score,
}
"""How compact and separate the clusters are, labels apart: Euclidean; more, more, and less is better."""

SCORES = (*EXTERNAL, *INTERNAL)


@dataclass(frozen=True)
class Clusterability:
    """The scores of every layer of a stack, from layer 0; None where a score is undefined (one cluster, say).

    `chance` is the ARI that 95 % of random orders of the labels stay below, per layer.
    """

    stack: StackName
    flatten: bool
    examples: int
    scores: dict[str, list[float | None]]
    chance: list[float]


def clusterability(
    model: nn.Module, batches: Sequence[Batch], classes: int, stack: StackName = "", flatten: bool = False
) -> Clusterability:
    """Return the scores of k-means clusters of each layer against the `labels` of the batches.

    An example is the mean of its real tokens, or with `flatten`, as in the released code of Suzuki et al. (2025), its
    whole `(seq, hidden)` matrix, padding too: all batches must then be padded to one length. k-means is
    scikit-learn's with `classes` clusters, `n_init=10` and `random_state=0`, as there.
    Raises UserError for batches of unequal length with `flatten`, LeftOut for fewer examples than needed.
    """
    labels = np.concatenate([batch["labels"].cpu().numpy() for batch in batches])
    if len(labels) <= classes:
        raise LeftOut(f"{len(labels)} examples cannot be put into {classes} clusters; more are needed")
    if flatten and len({batch["input_ids"].shape[1] for batch in batches}) > 1:
        raise UserError("flattened features need batches padded to one length: collate with padding to max_length.")
    layers = layers_of(model, stack)
    # Whole matrices of all layers would not fit into memory: one pass per layer then.
    passes = [[layer] for layer in layers] if flatten else [layers]
    found: dict[str, list[float | None]] = {name: [] for name in SCORES}
    chance: list[float] = []
    for together in passes:
        for rows in features(model, batches, together, flatten):
            clusters = cluster(rows, classes)
            chance.append(chance_ari(clusters, labels))
            for name, value in cluster_scores(rows, clusters, labels).items():
                found[name].append(value)
    return Clusterability(stack, flatten, len(labels), found, chance)


def cluster(rows: Features, classes: int) -> Labels:
    """Return the k-means cluster of each row of `(examples, features)`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters: scored as they are
        return KMeans(n_clusters=classes, random_state=0, n_init=10).fit_predict(rows)


def cluster_scores(rows: Features, clusters: Labels, labels: Labels) -> dict[str, float | None]:
    """Return the seven scores of clusters of `rows` `(examples, features)` against `labels`, both `(examples,)`."""
    found: dict[str, float | None] = {name: float(score(labels, clusters)) for name, score in EXTERNAL.items()}
    separate = 1 < len(set(clusters.tolist())) < len(rows)
    return found | {name: float(score(rows, clusters)) if separate else None for name, score in INTERNAL.items()}


def chance_ari(clusters: Labels, labels: Labels) -> float:
    """Return the 95th percentile of the ARI over `SHUFFLES` random orders of the labels.

    Hubert and Arabie's index; of its terms only the number of pairs together in both changes with the order.
    """
    _, clusters = np.unique(clusters, return_inverse=True)
    _, labels = np.unique(labels, return_inverse=True)
    width = int(clusters.max()) + 1
    in_clusters, in_classes = pairs_together(np.bincount(clusters)), pairs_together(np.bincount(labels))
    expected = in_clusters * in_classes / pairs_together(np.array([len(labels)]))
    span = (in_clusters + in_classes) / 2 - expected
    if span == 0:  # everything in one cluster and in one class
        return 0.0
    draw = np.random.default_rng(0)
    shuffled = (draw.permutation(labels) for _ in range(SHUFFLES))
    agreeing = np.array([pairs_together(np.bincount(order * width + clusters)) for order in shuffled])
    return float(np.quantile((agreeing - expected) / span, 0.95))


def pairs_together(sizes: Labels) -> float:
    """Return how many pairs of examples lie in the same of several groups of these sizes."""
    return float((sizes * (sizes - 1)).sum()) / 2


def features(model: nn.Module, batches: Sequence[Batch], layers: Sequence[LayerRef], flatten: bool) -> list[Features]:
    """Return one row per example for each layer, `(examples, hidden)` or `(examples, seq * hidden)`; one pass."""
    rows: list[list[Features]] = [[] for _ in layers]
    with evaluating(model), torch.no_grad():
        for batch in batches:
            signal = run_model(model, batch, layers, logits=False)
            for kept, layer in zip(rows, layers, strict=True):
                states, mask = signal.hidden[layer].float(), signal.masks[layer.stack]
                kept.append((states.flatten(1) if flatten else pooled(states, mask)).cpu().numpy())
    return [np.concatenate(kept) for kept in rows]


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over real tokens, `(batch, hidden)`, of `(batch, seq, hidden)`; 0 for a text without any."""
    real = mask.bool().unsqueeze(-1)
    return states.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)
