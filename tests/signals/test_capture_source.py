"""Both models are run the same way: no labels, no caches, no head that nobody asked for, and the right masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, FITTING, tiny_batch, tiny_model
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef, Needs
from layerdistill.signals import LiveTeacher, run_model, student_signal
from layerdistill.signals.source import batch_masks, restore_padding

CASES = [
    (head, family)
    for head in ("sequence-classification", "causal-lm", "seq2seq-lm", "masked-lm")
    for family in FITTING[head]
]


def layers_of(family: str) -> list[LayerRef]:
    names = ["encoder.1", "decoder.2", "decoder.final"] if family in ("bart", "t5") else ["1", "4", "final"]
    return [LayerRef.parse(name) for name in names]


@pytest.mark.parametrize(("head", "family"), CASES)
def test_student_and_teacher_say_the_same_of_the_same_model(head: str, family: str) -> None:
    model = tiny_model(family, head)
    batch = tiny_batch(model)
    layers = layers_of(family)
    expected = model(**batch).logits
    student = student_signal(model, batch, layers)
    assert student.logits is not None
    assert torch.equal(student.logits, expected)
    assert set(student.hidden) == set(layers)
    assert student.logits.requires_grad
    assert all(tensor.requires_grad for tensor in student.hidden.values())

    teacher = LiveTeacher(model.train()).signal(batch, Needs(teacher=frozenset(layers), teacher_logits=True))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert teacher.logits is not None
    # Without a graph another attention kernel may be chosen, so the last bit may differ (T5).
    torch.testing.assert_close(teacher.logits, expected)
    for layer in layers:
        torch.testing.assert_close(teacher.hidden[layer], student.hidden[layer])
        assert not teacher.hidden[layer].requires_grad
        assert teacher.hidden[layer].shape[:2] == teacher.masks[layer.stack].shape


@pytest.mark.parametrize(("head", "family"), CASES)
def test_without_logits_the_head_is_not_run_and_the_layers_are_the_same(head: str, family: str) -> None:
    model = tiny_model(family, head)
    batch = tiny_batch(model)
    layers = layers_of(family)
    whole = run_model(model, batch, layers, logits=True)
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("whole"))
    signal = run_model(model, batch, layers, logits=False)
    assert signal.logits is None
    for layer in layers:
        assert torch.equal(signal.hidden[layer], whole.hidden[layer])
    # A classifier with a decoder makes the decoder's input itself; T5 has no base model below its language model.
    whole_only = (family, head) == ("t5", "seq2seq-lm") or (family in ("bart", "t5") and head.startswith("sequence"))
    assert calls == (["whole"] if whole_only else [])


def test_nothing_asked_for_runs_nothing() -> None:
    model = tiny_model("bert")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    signal = LiveTeacher(model).signal(tiny_batch(model), Needs())
    assert (signal.logits, signal.hidden) == (None, {})
    assert torch.equal(signal.masks[""], tiny_batch(model)["attention_mask"])


def test_labels_and_foreign_columns_do_not_reach_the_model() -> None:
    model = tiny_model("gpt2", "causal-lm")
    batch = tiny_batch(model)
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    extra = {"labels": batch["input_ids"], "example_id": torch.arange(3), "output_hidden_states": torch.ones(1)}
    student_signal(model, batch | extra, [])
    assert set(seen[0]) == {"input_ids", "attention_mask", "use_cache"}
    assert seen[0]["use_cache"] is False


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_decoder_gets_its_input_from_the_labels_and_its_mask_too(family: str) -> None:
    model = tiny_model(family, "seq2seq-lm")
    source = {key: value for key, value in tiny_batch(model).items() if not key.startswith("decoder")}
    labels = torch.tensor([[5, 6, 2], [7, 2, -100], [2, -100, -100]])
    signal = student_signal(model, source | {"labels": labels}, layers_of(family))
    assert signal.logits is not None
    assert torch.equal(signal.logits, model(**source, labels=labels).logits)
    assert signal.masks["decoder"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert torch.equal(signal.masks["encoder"], source["attention_mask"])
    assert signal.hidden[LayerRef("decoder", 2)].shape == (3, 3, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks(family: str) -> None:
    model = tiny_model(family)
    batch = tiny_batch(model)
    masks = batch_masks(model, batch)
    without = batch_masks(model, {"input_ids": batch["input_ids"]})
    if family in ("bart", "t5"):
        assert torch.equal(masks["encoder"], batch["attention_mask"])
        assert torch.equal(masks["decoder"], batch["decoder_attention_mask"])
        assert set(without) == {"encoder", "decoder"}
    else:
        assert torch.equal(masks[""], batch["attention_mask"])
    assert all(bool((mask == 1).all()) for mask in without.values())


def test_padding_that_a_kernel_dropped_is_put_back() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    tokens = torch.arange(6.0).view(3, 2).requires_grad_()
    expected = torch.tensor([[[0.0, 1.0], [2.0, 3.0], [0.0, 0.0]], [[4.0, 5.0], [0.0, 0.0], [0.0, 0.0]]])
    restored = restore_padding(tokens, mask)
    assert torch.equal(restored, expected)
    restored.sum().backward()
    assert torch.equal(tokens.grad, torch.ones(3, 2))
    padded = torch.zeros(2, 3, 5)
    assert restore_padding(padded, mask) is padded
    for other in (torch.zeros(4, 2), torch.zeros(3, 2, 5)):
        with pytest.raises(UserError, match="does not fit a batch of"):
            restore_padding(other, mask)


def test_a_base_model_has_no_logits() -> None:
    model = tiny_model("bert")
    with pytest.raises(UserError, match="BertModel gives no logits"):
        student_signal(model, tiny_batch(model), [])


def test_padding_is_in_the_mask_not_in_the_way() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model)
    other: dict[str, Tensor] = dict(batch)
    other["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 9)
    first, second = (run_model(model, given, [LayerRef("", 4)], logits=False) for given in (batch, other))
    real = first.masks[""].bool()
    torch.testing.assert_close(first.hidden[LayerRef("", 4)][real], second.hidden[LayerRef("", 4)][real])
