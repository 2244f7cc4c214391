"""Importance of blocks against slow float64 references, written from the formulas, on small models."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn import functional
from toy import ToyCollator, toy_rows
from transformers import PreTrainedModel

import layerdistill as ld
from layerdistill.core.errors import UserError
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.matching.importance import angular_distance, block_influence
from layerdistill.models import find_stacks
from layerdistill.signals.importance import IMPORTANCE, one_out_kl

ALL = sorted(IMPORTANCE)


def batches_of(task: str, size: int = 10, per_batch: int = 4) -> list[dict[str, Tensor]]:
    rows = toy_rows(task, size=size, seed=8)
    collate = ToyCollator(task)
    return [collate(rows[start : start + per_batch]) for start in range(0, size, per_batch)]


def model_of(task: str, family: str = "llama", **options: object) -> PreTrainedModel:
    head = "causal-lm" if task == "causal-lm" else "sequence-classification"
    return tiny_model(family, head, num_layers=3, seed=6, **options).double()


@torch.no_grad()
def block_io(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What enters and leaves each block, by plain hooks."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple, output: object) -> None:
        leaving = output[0] if isinstance(output, tuple) else output
        found.append((args[0].clone(), leaving.clone()))

    hooks = [block.register_forward_hook(keep) for block in find_stacks(model)[""].blocks]
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    return found


def cosine(u: Tensor, v: Tensor) -> float:
    dot = sum(float(a) * float(b) for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(sum(float(a) ** 2 for a in u) * sum(float(b) ** 2 for b in v))


@pytest.mark.parametrize("family", ["llama", "deberta-v2", "modernbert"])
@pytest.mark.parametrize("criterion", ["block_influence", "angular_distance"])
def test_distances_against_loops_over_tokens(criterion: str, family: str) -> None:
    options = {"conv_kernel_size": 3, "conv_act": "gelu"} if family == "deberta-v2" else {}
    model, batches = model_of("sequence-classification", family, **options), batches_of("sequence-classification")
    per_sequence: list[list[float]] = [[], [], []]
    for batch in batches:
        for block, (entering, leaving) in enumerate(block_io(model, batch)):
            for row, mask in enumerate(batch["attention_mask"]):
                real = [place for place in range(len(mask)) if mask[place]]
                cosines = [cosine(entering[row, place], leaving[row, place]) for place in real]
                value = math.acos(cosines[-1]) / math.pi
                if criterion == "block_influence":
                    value = sum(1 - found for found in cosines) / len(cosines)
                per_sequence[block].append(value)
    expected = [sum(values) / len(values) for values in per_sequence]
    assert IMPORTANCE[criterion](model, "sequence-classification", batches) == pytest.approx(expected, abs=1e-7)
    assert min(expected) > 5e-4


def test_cka_redundancy_against_the_gram_form() -> None:
    model, batches = model_of("causal-lm"), batches_of("causal-lm")
    sides: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(3)]
    for batch in batches:
        kept = batch["attention_mask"].bool()
        for (xs, ys), (entering, leaving) in zip(sides, block_io(model, batch), strict=True):
            xs.append(entering[kept])
            ys.append(leaving[kept])
    expected = []
    for xs, ys in sides:
        x, y = torch.cat(xs), torch.cat(ys)
        centre = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
        k, other = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
        expected.append(1 - float((k * other).sum() / (k.norm() * other.norm())))
    assert IMPORTANCE["cka_redundancy"](model, "causal-lm", batches) == pytest.approx(expected, abs=1e-9)
    assert max(expected) > 1e-3


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_one_out_loss_against_models_built_without_the_block(task: str) -> None:
    model, batches = model_of(task), batches_of(task)

    @torch.no_grad()
    def loss(of: nn.Module) -> float:
        total = count = 0.0
        for batch in batches:
            logits, labels = (
                of(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits,
                batch["labels"],
            )
            if task == "causal-lm":
                logits, labels = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
            total += float(functional.cross_entropy(logits, labels, reduction="sum"))
            count += float((labels != -100).sum())
        return total / count

    without = [ld.make_student(model, copy_map=[b for b in range(3) if b != block]) for block in range(3)]
    expected = [loss(smaller) - loss(model) for smaller in without]
    assert IMPORTANCE["one_out_loss"](model, task, batches) == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 4) for value in expected}) == 3


@pytest.mark.parametrize("with_reference", [False, True])
def test_one_out_kl_against_loops_over_tokens(with_reference: bool) -> None:
    model, batches = model_of("causal-lm"), batches_of("causal-lm", size=5)
    reference = tiny_model("llama", "causal-lm", num_layers=3, seed=9).double() if with_reference else model

    @torch.no_grad()
    def kl(of: nn.Module) -> float:
        total, count = 0.0, 0
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            wanted, ours = reference(**inputs).logits.softmax(-1), of(**inputs).logits.softmax(-1)
            for row, labels in enumerate(batch["labels"]):
                for place in range(len(labels) - 1):
                    if labels[place + 1] != -100:
                        p, q = wanted[row, place], ours[row, place]
                        total += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
                        count += 1
        return total / count

    without = [ld.make_student(model, copy_map=[b for b in range(3) if b != block]) for block in range(3)]
    expected = [kl(smaller) - kl(model) for smaller in without]
    found = one_out_kl(model, "causal-lm", batches, reference if with_reference else None)
    assert found == pytest.approx(expected, abs=1e-6)


def make_identity(block: nn.Module) -> None:
    """Let a pre-norm block add nothing to what passes through it."""
    outputs = {"o_proj", "down_proj", "dense", "fc2", "out_proj", "c_proj", "Wo", "dense_4h_to_h"}
    found = [module for name, module in block.named_modules() if name.rpartition(".")[2] in outputs]
    assert len(found) == 2
    with torch.no_grad():
        for module in found:
            for parameter in module.parameters():
                parameter.zero_()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt-neox", "phi", "modernbert"])
@pytest.mark.parametrize("criterion", ALL)
def test_a_block_that_is_the_identity_has_importance_zero(criterion: str, family: str) -> None:
    task = "sequence-classification" if family == "modernbert" else "causal-lm"
    model = tiny_model(family, "causal-lm" if task == "causal-lm" else task, num_layers=3, seed=6)
    make_identity(find_stacks(model)[""].blocks[1])
    found = IMPORTANCE[criterion](model, task, batches_of(task))
    assert found[1] == pytest.approx(0.0, abs=1e-12)
    assert abs(found[0]) > 1e-5
    assert abs(found[2]) > 1e-5


@pytest.mark.parametrize("criterion", ALL)
@pytest.mark.parametrize("task", ["regression", "multi-label-classification"])
def test_other_tasks_and_nothing_is_changed(criterion: str, task: str) -> None:
    labels = 1 if task == "regression" else 3
    model = tiny_model("bert", "sequence-classification", num_layers=3, num_labels=labels, seed=6)
    model.train()
    model.bert.encoder.layer[1].eval()
    before = fingerprint_model(model)
    found = IMPORTANCE[criterion](model, task, batches_of(task))
    assert len(found) == 3
    assert all(math.isfinite(value) for value in found)
    assert fingerprint_model(model) == before
    assert [block.training for block in model.bert.encoder.layer] == [True, False, True]
    assert IMPORTANCE[criterion](model, task, batches_of(task)) == found


@pytest.mark.parametrize("criterion", [name for name in ALL if name != "one_out_loss"])
def test_padding_does_not_count(criterion: str) -> None:
    model, rows = model_of("causal-lm"), toy_rows("causal-lm", size=4, seed=8)
    plain, padded = ToyCollator("causal-lm")(rows), ToyCollator("causal-lm", to=20)(rows)
    found = IMPORTANCE[criterion](model, "causal-lm", [padded])
    assert found == pytest.approx(IMPORTANCE[criterion](model, "causal-lm", [plain]), abs=1e-6)


def test_zero_vectors_and_empty_rows() -> None:
    entering = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[3.0, 4.0], [9.0, 9.0]], [[7.0, 7.0], [7.0, 7.0]]])
    leaving = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[-3.0, -4.0], [0.0, 1.0]], [[7.0, 7.0], [7.0, 7.0]]])
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    influence = block_influence(entering, leaving, mask)
    assert float(influence.total) == pytest.approx((0 + 1) / 2 + 2)
    assert float(influence.count) == 2
    angle = angular_distance(entering, leaving, mask)
    assert float(angle.total) == pytest.approx(0.5 + 1.0)
    assert float(angle.count) == 2
    with pytest.raises(UserError, match="equally wide"):
        block_influence(entering, leaving[..., :1])


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match="an encoder and a decoder"):
        IMPORTANCE["block_influence"](tiny_model("bart", "seq2seq-lm"), "seq2seq", batches_of("causal-lm"))
    with pytest.raises(UserError, match="at least one batch"):
        IMPORTANCE["one_out_loss"](model_of("causal-lm"), "causal-lm", [])
