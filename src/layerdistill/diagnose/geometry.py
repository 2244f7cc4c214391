"""The parts `angles` and `gradients`: tables, figures and one careful sentence for each state of the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layerdistill.diagnose.alignment import alignment_of, rotations
from layerdistill.diagnose.angles import StudentAngles, pairs_above_diagonal, pooled_histogram, student_angles, summary
from layerdistill.diagnose.figures import angle_histograms, angle_maps
from layerdistill.diagnose.gradients import GradientAngles, gradient_angles
from layerdistill.diagnose.states import layers_of, listed
from layerdistill.diagnose.subject import Subject, View, file_name, in_stack
from layerdistill.diagnose.tables import Finding, Grid, cells_with_null, matrix_grid, shown

AT_THE_NULL = 1.0
"""Degrees within which a mean angle is said to be at its null."""

PROBE = 16
"""Examples of the probe batch at most: every pair of layers costs a backward pass over it."""

ANGLE_COLUMNS = (
    "student", "layer", "mean angle", "null", "angle - null", "least pair", "widest pair", "25 %", "50 %", "75 %",
    "acute %",
)  # fmt: skip

GRADIENT_COLUMNS = (
    "student", "layer", "parameters below", "angle of parameter gradients", "null", "angle of state gradients",
    "null of states",
)  # fmt: skip


def find_angles(subject: Subject) -> Finding:
    """Return the angles between teacher layers seen from every layer of every state of the student."""
    finding = Finding("Angles between teacher layers, seen from the student")
    rows: list[list[str]] = []
    for stack, views in subject.stacks().items():
        found = {view.name: student_angles(subject.teacher, view.student, subject.batches, stack) for view in views}
        for view in views:
            angles = found[view.name]
            finding.data[view.label] = angles.to_json()
            rows += [angle_row(view, layer, angles) for layer in angles.layers]
            finding.reading.append(read_angles(view, angles))
        draw_angles(finding, found, views)
        for view in views:
            finding.grids += [
                teacher_grid(
                    f"{view.label}: mean angle (null) in degrees, seen from student layer {layer}",
                    cells_with_null(sums.mean, sums.null),
                )
                for layer, sums in found[view.name].layers.items()
            ]
    note = "degrees; acute: share of tokens and pairs below 90, which is 100 % of the null"
    finding.grids.insert(0, Grid(f"Angles over all pairs of teacher layers ({note})", ANGLE_COLUMNS, rows))
    finding.reading.append(
        "The null is norm-matched: 60 degrees at equal norms, less for a longer student state. An angle below it says "
        "that directions to different teacher layers have something in common; layers of one residual stream do, "
        "whatever the student. It does not say that the choice of layers changes nothing after training."
    )
    return finding


def angle_row(view: View, layer: int, angles: StudentAngles) -> list[str]:
    """Return one line of the table of angles."""
    said = summary(angles.layers[layer])
    apart = None if said["angle"] is None or said["null_angle"] is None else said["angle"] - said["null_angle"]
    degrees = [
        said["angle"],
        said["null_angle"],
        apart,
        *(said[k] for k in ("smallest", "widest", "q25", "q50", "q75")),
    ]
    acute = said["acute"]
    percent = None if acute is None else 100 * acute
    return [view.label, str(layer), *(shown(value) for value in degrees), shown(percent)]


def read_angles(view: View, angles: StudentAngles) -> str:
    """Return the sentence that says how far the mean angle lies from its null."""
    mean = average([pairs_above_diagonal(sums.mean) for sums in angles.layers.values()])
    null = average([pairs_above_diagonal(sums.null) for sums in angles.layers.values()])
    if mean is None or null is None:
        return f"{view.label}: no token has an angle (the student's states equal the teacher's)."
    layers = f"student layers {min(angles.layers)} to {max(angles.layers)}"
    turned = ", the student rotated into the teacher's space" if angles.alignment == "orthogonal" else ""
    below, pairs = pairs_below([(sums.mean, sums.null) for sums in angles.layers.values()])
    return (
        f"{view.label}: over {layers}{turned}, mean angle {mean:.1f} degrees, null {null:.1f}: {beside(mean, null)}; "
        f"{below} of {pairs} pairs of teacher layers lie below their own null."
    )


def beside(angle: float, null: float) -> str:
    """Return where an angle lies relative to its null."""
    if abs(angle - null) < AT_THE_NULL:
        return f"within {AT_THE_NULL:.0f} degree of what independent directions would show"
    return (
        f"{abs(angle - null):.1f} degrees {'below' if angle < null else 'above'} what independent directions would show"
    )


def pairs_below(matrices: Sequence[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """Return how many pairs i < k have an angle below its null, and of how many."""
    apart = torch.cat([pairs_above_diagonal(angle - null) for angle, null in matrices])
    return int((apart < 0).sum()), len(apart)


def average(values: list[Tensor]) -> float | None:
    """Return the mean of all entries, None where there are none."""
    together = torch.cat(values)
    return float(together.mean()) if len(together) else None


def draw_angles(finding: Finding, found: Mapping[str, StudentAngles], views: list[View]) -> None:
    """Add the heat maps and the histograms of one stack."""
    stack = views[0].stack
    maps = {
        name: {layer: (sums.mean, sums.null) for layer, sums in angles.layers.items()} for name, angles in found.items()
    }
    turned = ", student rotated into the teacher's space" if found[views[0].name].alignment == "orthogonal" else ""
    title = in_stack(f"Angles between teacher layers, seen from the student{turned}", stack)
    finding.figures[file_name("angles", stack)] = angle_maps(maps, title)
    finding.figures[file_name("angle-histograms", stack)] = angle_histograms(
        {name: {k: pooled_histogram(sums) for k, sums in angles.layers.items()} for name, angles in found.items()},
        {
            name: {k: average([pairs_above_diagonal(sums.null)]) or 0.0 for k, sums in angles.layers.items()}
            for name, angles in found.items()
        },
        {name: angles.released.counts for name, angles in found.items() if angles.released is not None},
        in_stack("Distribution of the angles over tokens", stack),
    )


def teacher_grid(title: str, cells: list[list[str]]) -> Grid:
    """Return a matrix over teacher layers from 0."""
    names = [str(number) for number in range(len(cells))]
    return matrix_grid(title, cells, "teacher layer", names, names)


def find_gradients(subject: Subject) -> Finding:
    """Return the angles between gradients of the matching losses on the first batch, in both spaces."""
    finding = Finding("Angles between the gradients of the matching losses")
    rows: list[list[str]] = []
    probe = {name: values[:PROBE] for name, values in subject.batches[0].items()}
    for stack, views in subject.stacks().items():
        drawn: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        for view in views:
            turned = rotations(subject.teacher, view.student, subject.batches, stack)
            found = {
                layer.number: gradient_angles(
                    subject.teacher, view.student, probe, layer.number, stack, turned[layer.number]
                )
                for layer in layers_of(view.student, stack)[1:]
            }
            finding.data[view.label] = gradients_to_json(found, alignment_of(subject.teacher, view.student, stack))
            rows += [gradient_row(view, layer, angles) for layer, angles in found.items()]
            finding.reading.append(read_gradients(view, found))
            drawn[view.name] = {k: (angles.parameters, angles.parameters_null) for k, angles in found.items()}
            finding.grids += [
                teacher_grid(
                    f"{view.label}: angle of parameter gradients (null) in degrees, student layer {layer}",
                    cells_with_null(angles.parameters, angles.parameters_null),
                )
                for layer, angles in found.items()
            ]
        title = in_stack("Angles between gradients of MSE(S, T_i) in parameter space", stack)
        finding.figures[file_name("gradients", stack)] = angle_maps(drawn, title)
    examples = probe["input_ids"].shape[0]
    note = f"degrees, means over pairs of teacher layers; one probe batch of {examples} examples"
    finding.grids.insert(0, Grid(f"Gradients of the matching losses ({note})", GRADIENT_COLUMNS, rows))
    finding.reading.append(
        "Below 90 degrees a small step for one teacher layer lowers the loss of the other too. Gradients with nothing "
        "in common stand at 90; the null printed beside the angle lets them share the student's own part (see the "
        "documentation). This is one batch at one point of training, not the course of it."
    )
    return finding


def gradients_to_json(found: Mapping[int, GradientAngles], alignment: str) -> dict[str, object]:
    """Return every matrix (rows and columns: teacher layers from 0)."""
    return {
        "alignment": alignment,
        "student_layers": {
            str(layer): {
                "parameters_below": angles.count,
                "parameters": listed(angles.parameters),
                "parameters_null": listed(angles.parameters_null),
                "states": listed(angles.states),
                "states_null": listed(angles.states_null),
            }
            for layer, angles in found.items()
        },
    }


def gradient_row(view: View, layer: int, angles: GradientAngles) -> list[str]:
    """Return one line of the table of gradients."""
    means = [
        average([pairs_above_diagonal(matrix)])
        for matrix in (angles.parameters, angles.parameters_null, angles.states, angles.states_null)
    ]
    return [view.label, str(layer), f"{angles.count:,}", *(shown(value) for value in means)]


def read_gradients(view: View, found: Mapping[int, GradientAngles]) -> str:
    """Return the sentence that puts both spaces side by side."""
    means = [
        average([pairs_above_diagonal(getattr(angles, name)) for angles in found.values()])
        for name in ("parameters", "parameters_null", "states", "states_null")
    ]
    if any(value is None for value in means):
        return f"{view.label}: the gradients are 0, so they have no angle."
    ours, null, states, states_null = (value for value in means if value is not None)
    below, pairs = pairs_below([(angles.parameters, angles.parameters_null) for angles in found.values()])
    return (
        f"{view.label}: mean angle of parameter gradients {ours:.1f} degrees, null {null:.1f}: {beside(ours, null)} "
        f"({below} of {pairs} pairs below); of the gradients in the states {states:.1f}, null {states_null:.1f}."
    )
