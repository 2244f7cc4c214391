"""k-means against labels: hand-made clusters are found, shuffled labels give nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from tiny_models import tiny_batch, tiny_model

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef
from layerdistill.diagnose.clusterability import (
    EXTERNAL,
    SCORES,
    chance_ari,
    cluster,
    cluster_scores,
    clusterability,
    features,
)
from layerdistill.diagnose.states import LeftOut


def clouds(each: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    centres = np.array([[0.0, 0, 0], [10, 0, 0], [0, 10, 0]])
    labels = np.repeat([2, 0, 1], each)
    return (centres[labels] + draw.normal(size=(3 * each, 3))).astype(np.float32), labels


def test_hand_made_clusters_are_found() -> None:
    rows, labels = clouds()
    clusters = cluster(rows, 3)
    found = cluster_scores(rows, clusters, labels)
    assert tuple(found) == SCORES
    assert all(found[name] == pytest.approx(1.0) for name in EXTERNAL)
    assert found["silhouette"] > 0.7
    assert found["davies_bouldin"] < 0.5
    assert found["calinski_harabasz"] > 1000


def test_shuffled_labels_give_about_0_where_chance_is_corrected() -> None:
    rows, labels = clouds()
    shuffled = np.random.default_rng(1).permutation(labels)
    clusters = cluster(rows, 3)
    found = cluster_scores(rows, clusters, shuffled)
    assert abs(found["ari"]) < 0.03
    assert abs(found["ami"]) < 0.03
    assert found["fowlkes_mallows"] > 0.3, "not corrected for chance"
    draw = np.random.default_rng(0)
    by_sklearn = [adjusted_rand_score(draw.permutation(labels), clusters) for _ in range(200)]
    assert chance_ari(clusters, labels) == pytest.approx(np.quantile(by_sklearn, 0.95), rel=1e-9)
    assert 0 < chance_ari(clusters, labels) < 0.03
    assert found["silhouette"] == cluster_scores(rows, clusters, labels)["silhouette"], "labels do not enter"


def test_equal_rows_have_no_silhouette() -> None:
    rows, labels = np.ones((6, 2), dtype=np.float32), np.array([0, 1, 0, 1, 0, 1])
    found = cluster_scores(rows, cluster(rows, 2), labels)
    assert found["silhouette"] is None
    assert found["ari"] == 0


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_features_are_means_over_real_tokens_or_whole_matrices(family: str) -> None:
    model = tiny_model(family)
    batch = tiny_batch(model)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states[2]
    layers = [LayerRef("", 0), LayerRef("", 2)]
    _, found = features(model, [batch, batch], layers, flatten=False)
    for row in range(3):
        expected = states[row, : batch["attention_mask"][row].sum()].mean(0)
        np.testing.assert_allclose(found[row], expected.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[:3], found[3:])
    (flat,) = features(model, [batch], layers[1:], flatten=True)
    np.testing.assert_allclose(flat, states.flatten(1).numpy(), rtol=1e-4, atol=1e-5)


def test_every_layer_is_scored_and_what_does_not_fit_is_said() -> None:
    model = tiny_model("bert")
    short, long = ({**tiny_batch(model, batch=4, seq=seq), "labels": torch.tensor([0, 1, 0, 1])} for seq in (6, 9))
    found = clusterability(model, [short, long], 2)
    assert found.examples == 8
    assert all(len(values) == 5 for values in (*found.scores.values(), found.chance))
    same = clusterability(model, [short, short], 2, flatten=True)
    assert len(same.scores["ari"]) == 5
    with pytest.raises(UserError, match="one length"):
        clusterability(model, [short, long], 2, flatten=True)
    with pytest.raises(LeftOut, match="8 examples cannot be put into 9 clusters"):
        clusterability(model, [short, long], 9)
