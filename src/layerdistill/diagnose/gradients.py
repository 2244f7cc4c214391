"""Angles between the gradients of matching losses: does a step for one teacher layer serve another?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerdistill.core.types import Batch, LayerRef, StackName
from layerdistill.diagnose.alignment import rotated
from layerdistill.diagnose.states import layer_states, refuse_more_than_free, refuse_wider_student
from layerdistill.matching import masked_mse
from layerdistill.matching.rows import real_rows
from layerdistill.models import evaluating, unwrap
from layerdistill.signals import run_model

CHUNK = 1 << 20
"""Numbers of a gradient that are multiplied at a time, in float64."""


@dataclass(frozen=True)
class GradientAngles:
    """Angles in degrees between the gradients of `MSE(S, T_i)`, `(layers, layers)` over teacher layers from 0.

    `states` is with respect to the student's states of the whole batch, `parameters` with respect to its parameters;
    each with its norm-matched null. `count` is how many numbers the parameters below the layer hold.
    """

    states: Tensor
    states_null: Tensor
    parameters: Tensor
    parameters_null: Tensor
    count: int


def gradient_angles(
    teacher: nn.Module,
    student: nn.Module,
    batch: Batch,
    layer: int,
    stack: StackName = "",
    rotation: Tensor | None = None,
) -> GradientAngles:
    """Return the angles between the gradients of `L_i = masked MSE(S Q, T_i)` on one probe batch, for all i.

    S is the student's `layer` in eval mode, Q its `rotation` (see `alignment.rotations`; held fixed), T_i the teacher's
    layer i. The gradient in the states is `2 (S Q - T_i) / n`: its angles are those of `layer_angles`, but of all
    tokens as one long vector. In parameter space it is `J' ` of that, with J the Jacobian of S in all parameters that S
    depends on. A gradient of 0 (T_i equal to S) has no angle: NaN.

    The null: with `g_S` the gradient of `MSE(S Q, 0)` and `g_i` that of L_i, `g_S - g_i` is the pull of T_i alone. Had
    `g_S` and the pulls their norms but independent directions, `cos = |g_S|^2 / sqrt((|g_S|^2 + |g_S - g_i|^2) (|g_S|^2
    + |g_S - g_k|^2))`, in either space: 60 degrees at equal norms. Gradients that shared nothing would stand at 90.

    Raises LeftOut for a student wider than the teacher, and where the gradients do not fit into memory.
    """
    refuse_wider_student(teacher, student, stack)
    ref = LayerRef(stack, layer)
    theirs, mask = layer_states(teacher, batch, stack)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    with evaluating(student), torch.enable_grad():
        ours = rotated(run_model(unwrap(student), batch, [ref], logits=False).hidden[ref], rotation)
        return angles_of_gradients(ours, [state.float() for state in theirs], mask, parameters)


def angles_of_gradients(
    ours: Tensor, theirs: Sequence[Tensor], mask: Tensor | None, parameters: Sequence[Tensor]
) -> GradientAngles:
    """Return the angles of the gradients of `MSE(ours, T_i)` in those of `parameters` that `ours` depends on.

    `ours` is `(batch, seq, width)` with its graph, which is kept; `theirs` holds the T_i, of the same shape. Raises
    LeftOut where the gradients, all of them at once, would take more than half of the free memory.
    """
    targets = [torch.zeros_like(ours), *theirs]
    below = _reached(ours, parameters)
    count = sum(parameter.numel() for parameter in below)
    # Twice: the list, and the stack made of it.
    needed = 2.0 * count * len(targets) * ours.element_size()
    refuse_more_than_free(needed, "the gradients of all matching losses", ours.device)
    gradients = torch.stack([_gradient(masked_mse(ours, target, mask).value, below) for target in targets])
    rows = torch.stack([real_rows(ours.detach() - target, mask).flatten() for target in targets])
    return GradientAngles(*_angles(rows), *_angles(gradients), count)


def _reached(states: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters that the states depend on: those below the layer."""
    found = torch.autograd.grad(states.sum(), parameters, retain_graph=True, allow_unused=True)
    return [parameter for parameter, gradient in zip(parameters, found, strict=True) if gradient is not None]


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradient as one vector, float32 (float64 if the parameters are)."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in found])


def _angles(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return angles and their null of `(1 + layers, n)` vectors: first g_S, then all g_i."""
    own, towards = vectors[:1], vectors[1:]
    products = _products(towards, towards)
    square = _products(own, own)[0, 0]
    pulls = square - 2 * _products(own, towards)[0] + products.diagonal()
    lengths = products.diagonal().sqrt()
    null_lengths = (square + pulls.clamp(min=0)).sqrt()
    defined = (lengths > 0).unsqueeze(0) & (lengths > 0).unsqueeze(1)
    found = _degrees(products, lengths, defined)
    return found, _degrees(square.expand_as(products), null_lengths, defined)


def _products(first: Tensor, second: Tensor) -> Tensor:
    """Return all inner products in float64, a piece of the vectors at a time."""
    found = torch.zeros(len(first), len(second), dtype=torch.float64, device=first.device)
    for a, b in zip(first.split(CHUNK, dim=1), second.split(CHUNK, dim=1), strict=True):
        found += a.double() @ b.double().T
    return found


def _degrees(products: Tensor, lengths: Tensor, defined: Tensor) -> Tensor:
    cosines = (products / (lengths.unsqueeze(0) * lengths.unsqueeze(1))).clamp(-1, 1)
    angles = torch.rad2deg(cosines.arccos()).fill_diagonal_(0.0)
    return torch.where(defined, angles, torch.full_like(angles, torch.nan)).cpu()
