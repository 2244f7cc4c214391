"""The parts `similarity`, `importance` and `clusterability`: tables, figures, and a careful sentence for each model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from layerdistill.core.types import StackName
from layerdistill.diagnose.clusterability import EXTERNAL, SCORES, Clusterability, clusterability
from layerdistill.diagnose.figures import profiles, similarity_maps
from layerdistill.diagnose.importance import importance_profile
from layerdistill.diagnose.similarity import similarity_matrix
from layerdistill.diagnose.states import LeftOut, listed, number
from layerdistill.diagnose.subject import Subject, View, file_name, in_stack
from layerdistill.diagnose.tables import Finding, Grid, matrix_grid, shown
from layerdistill.models import find_stacks

DEBIASED = True
"""Whether CKA is estimated without bias."""


def find_similarity(subject: Subject) -> Finding:
    """Return CKA between all layers of the teacher and of each state of the student."""
    finding = Finding("Similarity of layers (linear CKA, debiased)")
    best: list[list[str]] = []
    for stack, views in subject.stacks().items():
        found = {
            view.name: similarity_matrix(subject.teacher, view.student, subject.batches, stack, DEBIASED)
            for view in views
        }
        for view in views:
            matrix = found[view.name]
            finding.data[view.label] = {"debiased": DEBIASED, "cka": listed(matrix)}
            best += nearest_rows(view, matrix)
            finding.grids.append(similarity_grid(view, matrix))
        finding.reading += read_similarity(views, found)
        title = in_stack("Similarity of student and teacher layers", stack)
        finding.figures[file_name("similarity", stack)] = similarity_maps(found, title, DEBIASED)
    header = ("student", "layer", "nearest teacher layer", "CKA")
    finding.grids.insert(0, Grid("The teacher layer that each student layer is most similar to", header, best))
    finding.reading.append(
        "CKA is 1 for layers equal up to rotation and scale, about 0 for unrelated ones. Neighbouring layers of one "
        "model are similar to each other, so a nearest layer is rarely far ahead of its neighbours: see the figure."
    )
    return finding


def nearest_rows(view: View, matrix: Tensor) -> list[list[str]]:
    """Return which teacher layer is nearest to each student layer."""
    lines = []
    for layer, row in enumerate(matrix):
        nearest = None if bool(row.isnan().all()) else int(row.nan_to_num(-2.0).argmax())
        value = None if nearest is None else float(row[nearest])
        lines.append([view.label, str(layer), "–" if nearest is None else str(nearest), shown(value, 3)])
    return lines


def similarity_grid(view: View, matrix: Tensor) -> Grid:
    """Return the whole matrix."""
    rows, columns = ([str(layer) for layer in range(size)] for size in matrix.shape)
    cells = [[shown(float(value), 3) for value in row] for row in matrix]
    return matrix_grid(f"{view.label}: CKA", cells, "student \\ teacher layer", rows, columns)


def read_similarity(views: list[View], found: Mapping[str, Tensor]) -> list[str]:
    """Return a sentence for each state, and one for the change where there are two."""
    said = []
    for view in views:
        last = found[view.name][-1]
        nearest = int(last.nan_to_num(-2.0).argmax())
        said.append(
            f"{view.label}: the student's last layer is most similar to teacher layer {nearest} (CKA "
            f"{shown(float(last[nearest]), 3)}; with the teacher's last {shown(float(last[-1]), 3)})."
        )
    if "trained" in found and found["trained"].shape == found["start"].shape:
        change = (found["trained"] - found["start"]).nan_to_num(0.0)
        row, column = divmod(int(change.abs().argmax()), change.shape[1])
        said.append(
            f"From start to trained, CKA changed by {float(change.mean()):+.3f} on average over all pairs, most "
            f"between student layer {row} and teacher layer {column} ({float(change[row, column]):+.3f})."
        )
    return said


def find_importance(subject: Subject) -> Finding:
    """Return how important each block is to the teacher and to the student, by every criterion that fits."""
    finding = Finding("Importance of blocks")
    found: dict[str, dict[str, list[float]]] = {}
    for name, model in subject.models.items():
        found[name], reasons = importance_profile(model, subject.task, subject.batches)
        finding.data[name] = {
            "blocks_from": 0,
            **{key: [number(v) for v in values] for key, values in found[name].items()},
        }
        finding.grids.append(importance_grid(name, found[name]))
        finding.reading += [f"{name}: without {criterion}: {reason}" for criterion, reason in reasons.items()]
        least = {criterion: values.index(min(values)) for criterion, values in found[name].items()}
        finding.reading.append(
            f"{name}: least important block (from 0) by "
            + ", ".join(f"{criterion}: {block}" for criterion, block in least.items())
            + "."
        )
    criteria = list(dict.fromkeys(criterion for values in found.values() for criterion in values))
    panels = {
        criterion: {name: values[criterion] for name, values in found.items() if criterion in values}
        for criterion in criteria
    }
    finding.figures["importance.png"] = profiles(panels, "Importance of blocks", "block", zero_line=criteria)
    finding.reading.append(
        "Each criterion has a scale of its own; higher is more important. They look at one block at a time, without "
        "repair by training, so two blocks that can each be spared cannot for that reason both be spared."
    )
    return finding


def importance_grid(name: str, found: Mapping[str, list[float]]) -> Grid:
    """Return one line per block, one column per criterion."""
    blocks = range(len(next(iter(found.values()))))
    rows = [[str(block), *(shown(values[block], 4) for values in found.values())] for block in blocks]
    return Grid(f"{name}: importance of its blocks", ["block (from 0)", *found], rows)


def find_clusterability(subject: Subject) -> Finding:
    """Return how well k-means clusters of each layer agree with the classes; LeftOut for a task without classes."""
    if not subject.classes:
        raise LeftOut(f"the task {subject.task} gives no single class to an example, so there is nothing to agree with")
    flatten = subject.flat_batches is not None
    finding = Finding("Clusterability by class")
    by_stack: dict[StackName, dict[str, Clusterability]] = {}
    for name, model in subject.models.items():
        for stack in find_stacks(model):
            found = clusterability(model, subject.flat_batches or subject.batches, subject.classes, stack, flatten)
            by_stack.setdefault(stack, {})[name] = found
            label = in_stack(name, stack)
            finding.data[label] = {
                "features": "flattened" if flatten else "pooled over tokens",
                **found.scores,
                "ari_chance_95": found.chance,
            }
            finding.grids.append(cluster_grid(label, found))
            finding.reading.append(read_clusters(label, found))
    for stack, models in by_stack.items():
        panels = {score: {name: found.scores[score] for name, found in models.items()} for score in SCORES}
        how = "flattened tokens" if flatten else "mean over tokens"
        finding.figures[file_name("clusterability", stack)] = profiles(
            panels,
            in_stack(f"k-means clusters against classes ({how})", stack),
            "layer",
            ("ari", "ami", "silhouette"),
            EXTERNAL,
        )
    finding.reading.append(
        "ari and ami are 0 for clusters at random; v_measure and fowlkes_mallows are not corrected for chance. "
        "silhouette, calinski_harabasz (more is better) and davies_bouldin (less is better) do not look at the "
        "classes, and compare layers of unequal width only loosely. One k-means on one sample: differences of a "
        "few hundredths are no finding, and the highest of several layers is high by choice. A layer may hold the "
        "classes in a few directions that k-means does not see."
    )
    return finding


def cluster_grid(label: str, found: Clusterability) -> Grid:
    """Return one line per layer, one column per score."""
    layers = range(len(next(iter(found.scores.values()))))
    places = {"calinski_harabasz": 1}
    rows = [
        [str(layer), *(shown(values[layer], places.get(score, 3)) for score, values in found.scores.items())]
        for layer in layers
    ]
    return Grid(f"{label}: k-means clusters against classes, {found.examples} examples", ["layer", *found.scores], rows)


def read_clusters(label: str, found: Clusterability) -> str:
    """Return the sentence about the headline score."""
    values = torch.tensor([value if value is not None else float("nan") for value in found.scores["ari"]])
    best = int(values.nan_to_num(-2.0).argmax())
    return (
        f"{label}: ARI is highest at layer {best}: {values[best]:.3f}, where 95 % of shuffled labels stay below "
        f"{found.chance[best]:.3f}; at the last layer {values[-1]:.3f} ({found.chance[-1]:.3f})."
    )
