"""Angles, gradients and similarity of whole models, against the models' own hidden states and autograd by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matching import references
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.core.types import Batch
from layerdistill.diagnose.alignment import procrustes, rotations
from layerdistill.diagnose.angles import student_angles
from layerdistill.diagnose.gradients import angles_of_gradients, gradient_angles
from layerdistill.diagnose.similarity import similarity_matrix
from layerdistill.diagnose.states import LeftOut, refuse_more_than_free, shared_stacks

BATCH = tiny_batch(tiny_model("bert"), batch=6, seq=9)


def one_by_one(batch: Batch) -> list[Batch]:
    return [{name: values[a : a + 2] for name, values in batch.items()} for a in (0, 2, 4)]


def hidden(model: nn.Module, batch: Batch) -> list[Tensor]:
    with torch.no_grad():
        return list(model(**batch, output_hidden_states=True).hidden_states)


def test_angles_are_those_of_the_models_hidden_states_however_batched() -> None:
    teacher, student = tiny_model("bert", seed=1), tiny_model("bert", num_layers=2, seed=2)
    student.train()
    found = student_angles(teacher, student, one_by_one(BATCH))
    assert student.training, "modes are put back"
    whole = student_angles(teacher, student, [BATCH])
    student.eval()
    assert found.alignment == "none"
    assert list(found.layers) == [1, 2]
    mask = BATCH["attention_mask"].numpy()
    theirs = [references.real_tokens(layer.numpy(), mask) for layer in hidden(teacher, BATCH)]
    ours = [references.real_tokens(layer.numpy(), mask) for layer in hidden(student, BATCH)]
    for layer in (1, 2):
        torch.testing.assert_close(found.layers[layer].mean, whole.layers[layer].mean, rtol=1e-5, atol=1e-4)
        expected = references.mean_angle(theirs[1], theirs[4], ours[layer])
        assert found.layers[layer].mean[1, 4].item() == pytest.approx(expected, rel=1e-5)
    assert found.released is not None
    assert found.released.positions == BATCH["input_ids"].numel(), "padding is counted there"
    only = student_angles(teacher, student, [BATCH], student_layers=[0])
    assert list(only.layers) == [0]
    with pytest.raises(UserError, match="layers 0 to 2"):
        student_angles(teacher, student, [BATCH], student_layers=[3])


def test_a_copied_layer_has_no_angle_with_itself() -> None:
    teacher = tiny_model("bert")
    found = student_angles(teacher, teacher, [BATCH]).layers[2]
    assert found.mean[2].isnan().all()
    assert found.mean[0, 1].isfinite()
    assert student_angles(teacher, teacher, [BATCH]).to_json()["student_layers"]["2"]["mean"][2][0] is None


def test_a_narrower_student_is_rotated_by_least_squares() -> None:
    teacher, student = tiny_model("bert", seed=1), tiny_model("bert", num_layers=2, hidden_size=16, seed=2)
    found = rotations(teacher, student, one_by_one(BATCH), "")
    mask = BATCH["attention_mask"].bool()
    theirs = [layer[mask] for layer in hidden(teacher, BATCH)]
    for layer, q in zip(hidden(student, BATCH), found, strict=True):
        assert q is not None
        torch.testing.assert_close(q @ q.T, torch.eye(16), rtol=0, atol=1e-5)
        rows = layer[mask]

        def loss(turn: Tensor, rows: Tensor = rows) -> float:
            return sum(float((rows @ turn - target).square().sum()) for target in theirs)

        draw = torch.Generator().manual_seed(0)
        for _ in range(20):  # any other rotation near it is worse
            other = procrustes(q.double() + 0.05 * torch.randn(16, 32, generator=draw, dtype=torch.float64))
            assert loss(other) > loss(q)
    angles = student_angles(teacher, student, [BATCH])
    assert angles.alignment == "orthogonal"
    assert angles.layers[1].mean.isfinite().all()
    with pytest.raises(LeftOut, match="32 wide and the teacher's 16"):
        student_angles(student, teacher, [BATCH])


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return math.degrees(math.acos(references.cosine(a.astype(np.float64), b.astype(np.float64))))


def test_gradients_of_a_linear_model_by_hand() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=draw, dtype=torch.float64)
    weight = torch.randn(6, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    unused = torch.randn(3, generator=draw, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    states = x @ weight.T
    theirs = [torch.randn(3, 4, 6, generator=draw, dtype=torch.float64) for _ in range(3)]
    found = angles_of_gradients(states, theirs, mask, [weight, unused])
    assert found.count == 30, "only what the states depend on"

    def by_hand(target: Tensor) -> tuple[np.ndarray, np.ndarray]:
        in_weight, in_states = np.zeros((6, 5)), []
        for example in range(3):
            for position in range(4):
                if mask[example, position]:
                    apart = (states - target)[example, position].detach().numpy()
                    in_weight += np.outer(apart, x[example, position].numpy())
                    in_states.append(apart)
        return in_weight.ravel(), np.concatenate(in_states)

    own, *pulls = [by_hand(target) for target in (torch.zeros_like(states), *theirs)]
    for space, (values, null) in enumerate(
        ((found.parameters, found.parameters_null), (found.states, found.states_null))
    ):
        for i, k in ((0, 1), (0, 2), (1, 2)):
            assert values[i, k].item() == pytest.approx(angle(pulls[i][space], pulls[k][space]), rel=1e-9)
            square = sum(own[space] ** 2)
            lengths = [math.sqrt(square + sum((own[space] - pulls[n][space]) ** 2)) for n in (i, k)]
            expected = math.degrees(math.acos(square / lengths[0] / lengths[1]))
            assert null[i, k].item() == pytest.approx(expected, rel=1e-9)


def test_gradients_of_a_model_are_those_of_autograd() -> None:
    teacher, student = tiny_model("gpt2", seed=1), tiny_model("gpt2", num_layers=3, seed=2)
    batch = tiny_batch(teacher)
    found = gradient_angles(teacher, student, batch, layer=2)
    real = batch["attention_mask"].bool()
    theirs = hidden(teacher, batch)
    vectors = []
    for target in theirs[:4]:  # the fifth of transformers is normed
        student.zero_grad()
        ours = student(**batch, output_hidden_states=True).hidden_states[2]
        (ours - target)[real].square().mean().backward()
        vectors.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).numpy())
    assert vectors[0].size == found.count
    for i in range(4):
        for k in range(i):
            assert found.parameters[i, k].item() == pytest.approx(angle(vectors[i], vectors[k]), rel=1e-3)
            apart = [(hidden(student, batch)[2] - theirs[n])[real].flatten().numpy() for n in (i, k)]
            assert found.states[i, k].item() == pytest.approx(angle(*apart), rel=1e-4)


def test_similarity_of_a_model_with_itself_is_1_on_the_diagonal() -> None:
    model = tiny_model("bert")
    for debiased in (True, False):
        found = similarity_matrix(model, model, one_by_one(BATCH), debiased=debiased)
        torch.testing.assert_close(found.diagonal(), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-5)
        torch.testing.assert_close(found, found.T, rtol=0, atol=1e-5)
        assert (found - torch.eye(5)).max() < 0.999


def test_similarity_is_cka_of_all_real_tokens_however_batched() -> None:
    teacher, student = tiny_model("bert", seed=1), tiny_model("bert", num_layers=2, hidden_size=16, seed=2)
    found = similarity_matrix(teacher, student, one_by_one(BATCH))
    assert found.shape == (3, 5)
    real = BATCH["attention_mask"].bool()
    x, y = hidden(student, BATCH)[1][real], hidden(teacher, BATCH)[3][real]
    assert found[1, 3].item() == pytest.approx(references.debiased_cka(x.numpy(), y.numpy()), abs=1e-4)


def test_two_stacks_are_compared_each_with_its_own() -> None:
    teacher, student = tiny_model("bart", seed=1), tiny_model("bart", num_layers=2, seed=2)
    batch = tiny_batch(teacher)
    assert shared_stacks(teacher, student) == ["encoder", "decoder"]
    found = student_angles(teacher, student, [batch], "decoder").layers[1]
    assert found.tokens[0, 1] == batch["decoder_attention_mask"].sum()
    with pytest.raises(UserError, match="of the same kind"):
        shared_stacks(teacher, tiny_model("bert"))


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LeftOut, match=r"the products would take 1000000000\.0 GB of memory, of which"):
        refuse_more_than_free(1e18, "the products", torch.device("cpu"))
    refuse_more_than_free(10.0, "the products", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4e9, 8e9))
    refuse_more_than_free(1.9e9, "the products", torch.device("cuda"))
    with pytest.raises(LeftOut, match=r"would take 2\.1 GB of memory, of which 4\.0 GB are free"):
        refuse_more_than_free(2.1e9, "the products", torch.device("cuda"))
